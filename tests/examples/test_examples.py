"""What is in examples/ runs: each recipe on an empty model of its shape, the script and the notebook on a tiny one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import plan as planning
import pytest
from tiny import PROSE

from mlx_linearard.config import DistillConfig
from mlx_linearard.distill.__main__ import parse
from mlx_linearard.distill.__main__ import run as command

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
SMALL_MAC = 10e9  # bytes that macOS lets a GPU use on a Mac with 16 GB, less what other programs need
TINY = {"seq_len": 32, "grad_accum": 1, "steps": 2, "lora_rank": 4, "eval_tokens": 64}


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text("".join(f"{i}. {PROSE}" for i in range(2500)))
    return path


@pytest.fixture(scope="module", params=RECIPES, ids=lambda path: path.stem)
def recipe(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module")
def model(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planning.empty_model(tmp_path_factory.mktemp("empty") / recipe.stem, planning.shape_of(recipe))


def test_each_recipe_plans_its_run(
    recipe: Path, model: Path, long_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config", str(recipe), "--model", str(model), "--data", str(long_text)]
    assert command([*flags, "--output", str(tmp_path / "run"), "--dry-run", "--force"]) == 0
    told = capsys.readouterr().out
    assert told.endswith("nothing was written\n") and not list(tmp_path.iterdir())
    extended = int(re.search(r"window \d+ -> (\d+) tokens", told)[1])
    header = recipe.read_text().partition("\nmodel:")[0]
    assert extended == 1024 * int(re.search(r"K to (\d+)K tokens", header)[1])
    assert f"--config examples/recipes/{recipe.name} " in header


def test_each_recipe_says_what_the_planner_says(recipe: Path, tmp_path: Path) -> None:
    """Within 15 %: `python examples/recipes/plan.py --write` puts the new figures into the comments."""
    plan = planning.plan_of(recipe, tmp_path / "model")
    said = re.search(r"^# Planned: ([\d.]+) GB of memory or more; (.+) at 10 TFLOP/s", recipe.read_text(), re.M)
    assert said is not None
    assert float(said[1]) == pytest.approx(plan.memory.total / 1e9, rel=0.15)
    hours, minutes = re.fullmatch(r"(?:(\d+) h )?(\d+) min", said[2]).groups()
    assert 60 * (60 * int(hours or 0) + int(minutes)) == pytest.approx(plan.sizing.times.total, rel=0.15)
    if "16gb" in recipe.stem:
        assert plan.memory.total < SMALL_MAC


def test_the_issue_s_models_all_have_a_recipe() -> None:
    models = {DistillConfig(**planning.read_yaml(path)).model for path in RECIPES}
    assert models == json.loads((EXAMPLES / "recipes" / "shapes.json").read_text()).keys() and len(RECIPES) == 6


# Keys that a published config.json leaves to the defaults of its architecture, or that a copy of the model adds.
IMPLIED = {
    "meta-llama/Llama-2-7b-hf": {"rope_theta": 10000},
    "mlx-community/Mistral-7B-Instruct-v0.3-4bit": {"head_dim": 128, "quantization": {"group_size": 64, "bits": 4}},
}
PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())  # with the source of each
ALSO_PUBLISHED = json.loads((Path(__file__).parents[1] / "rope" / "published.json").read_text())


def test_the_shapes_are_those_of_the_published_configs() -> None:
    shapes = json.loads((EXAMPLES / "recipes" / "shapes.json").read_text())
    assert shapes.keys() == {*PUBLISHED, *(shapes.keys() & ALSO_PUBLISHED.keys())}
    for name, shape in shapes.items():
        published = PUBLISHED[name]["config"] if name in PUBLISHED else ALSO_PUBLISHED[name]
        known = {**IMPLIED.get(name, {}), **published}
        assert {key: known.get(key) for key in shape} == shape, name


@pytest.mark.parametrize("name", ["recipe.yaml", "paper.yaml"])
def test_the_general_recipes_plan_a_run(name: str, long_text: Path, tmp_path: Path) -> None:
    model = planning.empty_model(tmp_path / "model", planning.shape_of(EXAMPLES / "recipes" / "smollm2-1.7b.yaml"))
    flags = ["--config", str(EXAMPLES / name), "--model", str(model), "--data", str(long_text), "--dry-run", "--force"]
    assert parse(flags).model == str(model) and command([*flags, "--output", str(tmp_path / "run")]) == 0


# ---------------------------------------------------------------------------------------------------
# The script and the notebook


def test_the_script_runs(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """As it stands, with the demonstration's model and text replaced by tiny ones."""
    text = (EXAMPLES / "quickstart.py").read_text()
    code = [line for line in text.split('"""')[2].splitlines() if line.strip() and not line.startswith("#")]
    assert len(code) <= 15
    options = {"model": str(model_dir), "data": str(text_file), **TINY}
    tiny = ", ".join(f"{name}={value!r}" for name, value in options.items())
    changed = text.replace("DistillConfig(method", f"DistillConfig({tiny}, method")
    assert changed != text
    (tmp_path / "script.py").write_text(changed)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "restored: perplexity {32: " in done.stdout and (tmp_path / "quickstart-run" / "report.html").exists()


def notebook() -> dict[str, Any]:
    return json.loads((EXAMPLES / "notebook.ipynb").read_text())


def test_the_notebook_is_clean() -> None:
    for number, cell in enumerate(notebook()["cells"]):
        if cell["cell_type"] == "code":
            compile("".join(cell["source"]), f"cell {number}", "exec")
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    nbformat.validate(book)
    (parameters,) = (i for i, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", ()))
    own = f"MODEL, DATA, OPTIONS = {str(model_dir)!r}, {str(text_file)!r}, {TINY!r}"
    book.cells.insert(parameters + 1, nbformat.v4.new_code_cell(own))
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    assert "nothing was written" in text and "top-1 agreement" in text
    pages = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert len(pages) == 1 and "KL to native" in pages[0]
    assert (tmp_path / "notebook-run" / "model" / "model.safetensors").exists()
