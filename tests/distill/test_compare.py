"""--compare: every objective reads the same tokens from the same start; one report, and no work is repeated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import yaml

from mlx_linearard.cli import run_command
from mlx_linearard.config import OBJECTIVES, DistillConfig
from mlx_linearard.distill.__main__ import parse
from mlx_linearard.distill.__main__ import run as command
from mlx_linearard.distill.compare import ComparedRuns, compare_objectives
from mlx_linearard.distill.listener import Listener
from mlx_linearard.errors import UserError
from mlx_linearard.evaluate.__main__ import run as evaluate
from mlx_linearard.report.__main__ import run as report
from mlx_linearard.report.load import read_run
from mlx_linearard.results import rows, statistics
from mlx_linearard.results.fields import Field
from mlx_linearard.results.objectives import ObjectiveVerdict
from mlx_linearard.results.rows import HELD_OUT, Results
from mlx_linearard.results.verdict import verdict

FLAGS = [
    "--seq-len", "32", "--grad-accum", "2", "--steps", "4", "--lora-rank", "4", "--learning-rate", "2e-3",
    "--long-weight", "0", "--eval-tokens", "256", "--save-every", "1", "--eval-lengths", "32,200",
]  # fmt: skip


def flags(model_dir: Path, text_file: Path, output: Path, *more: str) -> list[str]:
    return ["--model", str(model_dir), "--data", str(text_file), "--output", str(output), *FLAGS, *more]


class Stop(Listener):
    """Raises, as a second Ctrl-C does, in step `at` of run number `run`; records which runs made steps."""

    def __init__(self, run: int, at: int) -> None:
        self.run, self.at, self.runs = run, at, 0
        self.seen: list[tuple[int, int]] = []

    def step(self, record, total: int) -> None:
        self.runs += record.step == 1 or not self.seen
        self.seen.append((self.runs, record.step))
        if (self.runs, record.step) == (self.run, self.at):
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def made(model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of all objectives; tests must not write into it."""
    root = tmp_path_factory.mktemp("comparison") / "out"
    assert command(flags(model_dir, text_file, root, "--compare", ",".join(OBJECTIVES))) == 0
    return root


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_objective_has_a_run_and_a_row(made: Path) -> None:
    results = json.loads((made / "results.json").read_text())
    for name in OBJECTIVES:
        own = json.loads((made / name / "results.json").read_text())
        assert {k: results[name][k] for k in ("kl", "perplexity")} == {
            k: own["restored"][k] for k in ("kl", "perplexity")
        }
        assert own["native"] == results["native"] and own["scaled"] == results["scaled"]
        assert (made / name / "model").is_dir() and results[name]["training"]["tokens"] == 4 * 64
    assert results["restored"] == results["relation"]
    assert len({results[name]["kl"] for name in OBJECTIVES}) == len(OBJECTIVES)
    text = (made / "report.html").read_text() + (made / "report.md").read_text()
    assert all(f"Training loss, {name}" in text for name in OBJECTIVES) and "| restored |" not in text


def test_all_start_from_the_same_values_and_read_the_same_tokens(
    model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_linearard.distill import run as room

    seen = []
    execute = room.execute

    def watched(job, *rest):
        arrays = [np.array(array) for leaves in job.pair.parameters() for array in leaves.values()]
        seen.append((arrays, [job.blocks.batch(i, 1) for i in range(8)], job.text.held_out))
        return execute(job, *rest)

    monkeypatch.setattr("mlx_linearard.distill.compare.execute", watched)
    assert command(flags(model_dir, text_file, tmp_path / "out", "--compare", "ce,relation")) == 0
    (one, batches, held), (other, batches_, held_) = seen
    assert len(one) == len(other) > 0 and all(map(np.array_equal, one, other))
    assert any(array.any() for array in one)
    assert all(map(np.array_equal, batches, batches_)) and all(np.array_equal(held[n], held_[n]) for n in held)


def test_native_and_scaled_are_measured_once(
    model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(flags(model_dir, text_file, tmp_path / "out", "--compare", "logits,ce")) == 0
    told = capsys.readouterr().out
    assert told.count("measuring native and scaled: 456/456") == 1 and told.count("reading") == 1
    assert "logits, 1 of 2" in told and "ce, 2 of 2" in told and "Training took" in told
    rows = [line.split()[0] for line in told.splitlines() if line.endswith("%")]
    assert rows == ["native", "scaled", "logits", "ce"]


def test_a_stopped_comparison_goes_on_and_trains_nothing_twice(
    model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = ["--compare", "relation,ce,logits"]
    assert command(flags(model_dir, text_file, whole, *arguments)) == 0
    first = Stop(2, 3)
    with pytest.raises(KeyboardInterrupt):
        compare_objectives(parse(flags(model_dir, text_file, broken, *arguments)), first)
    assert first.seen == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (2, 3)]
    assert report([str(broken)]) == 0  # what there is
    assert "Still to come: ce and logits" in (broken / "report.md").read_text()
    assert "Training loss, ce" in (broken / "report.html").read_text()
    second = Stop(0, 0)
    result = compare_objectives(parse(flags(model_dir, text_file, broken, *arguments, "--resume")), second)
    assert isinstance(result, ComparedRuns) and [step for _, step in second.seen] == [3, 4, 1, 2, 3, 4]
    for name in result.objectives:
        a, b = (mx.load(str(root / name / "adapters" / "adapters.safetensors")) for root in (whole, broken))
        assert a.keys() == b.keys() and all(mx.array_equal(a[key], b[key]).item() for key in a)
        assert [m["step"] for m in metrics(broken / name)] == [1, 2, 3, 4]
    assert json.loads((whole / "results.json").read_text())["comparisons"] == result.results["comparisons"]


def test_a_report_in_the_middle_of_the_first_run(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compare_objectives(parse(flags(model_dir, text_file, root, "--compare", "ce,logits")), Stop(1, 3))
    assert not (root / "results.json").exists()
    assert report([str(root)]) == 0
    twin = (root / "report.md").read_text()
    assert "no verdict yet" in twin and "| scaled |" in twin and "## Training, ce" in twin


def test_objectives_may_be_added_and_left_out(made: Path, model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    root = shutil.copytree(made, tmp_path / "out")
    shutil.rmtree(root / "ce")  # so that it is made again
    results = json.loads((root / "results.json").read_text())
    results["relation"]["choice/x"] = {"metrics": {"acc": {"value": 1.0, "stderr": None}}}
    (root / "results.json").write_text(json.dumps(results))
    listener = Stop(0, 0)
    arguments = flags(model_dir, text_file, root, "--resume", "--compare", "relation,ce")
    result = compare_objectives(parse(arguments), listener)
    assert result and [step for _, step in listener.seen] == [1, 2, 3, 4]
    assert "logits" not in result.results and {"relation", "ce"} <= result.results.keys()
    assert result.results["relation"]["choice/x"]["metrics"]["acc"]["value"] == 1.0  # what evaluate has put there
    assert yaml.safe_load((root / "config.yaml").read_text())["compare"] == "relation,ce"
    assert (root / "logits" / "model").is_dir()  # left out, not thrown away


def test_overwrite_leaves_nothing_of_what_was_there(
    made: Path, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(made, tmp_path / "out")
    (root / "results.items").mkdir()
    assert command(flags(model_dir, text_file, root, "--overwrite", "--steps", "2", "--compare", "logits,ce")) == 0
    assert {path.name for path in root.iterdir()} == {
        "logits",
        "ce",
        "comparison.json",
        "config.yaml",
        "results.json",
        "report.html",
        "report.md",
    }
    assert [m["step"] for m in metrics(root / "ce")] == [1, 2]


def test_a_dry_run_plans_each_and_writes_nothing(model_dir: Path, text_file: Path, tmp_path: Path, capsys) -> None:
    assert command(flags(model_dir, text_file, tmp_path / "out", "--dry-run", "--compare", "relation,ce")) == 0
    assert capsys.readouterr().out.count("4 steps of 64 tokens") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--compare", "relation"], "--compare relation: must name two or more of relation, logits"),
        (["--compare", "relation,relation"], "each once"),
        (["--compare", "relation,kl"], "must name two or more"),
        (["--compare", "relation,ce", "--objective", "ce"], "--compare and --objective both choose"),
        (["--compare", "relation,ce"], "already holds a comparison: pass --resume"),
        (["--compare", "relation,ce", "--resume", "--lora-rank", "8"], "lora_rank was 4 and is 8"),
        (["--compare", "relation,ce", "--resume", "--seq-len", "16"], "seq_len was 32 and is 16"),
        (["--compare", "relation,ce", "--resume", "--eval-lengths", "32", "--steps", "5"], "held_out was"),
        (["--resume"], "holds a comparison: give --compare as well"),
        (["--overwrite"], "holds a comparison: give --compare as well"),
        (["--compare", "relation,ce", "--overwrite", "--model", "{}/ce/model"], "--overwrite would remove --model"),
        (["--compare", "relation,ce", "--resume", "--output", "{}/ce"], "holds no comparison to resume"),
        (["--compare", "relation,ce", "--overwrite", "--output", "{}/ce"], "is not a comparison"),
    ],
)
def test_mistakes_are_told_in_one_line_and_change_nothing(
    made: Path, model_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}

    before = state()
    arguments = flags(model_dir, text_file, made, *(part.format(made) for part in more))
    assert run_command(lambda: command(arguments)) == 2
    line = capsys.readouterr().err
    assert says in line and line.count("\n") == 1
    assert state() == before


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"identity": {}, "sizes": 3, "finished": {}}'])
def test_what_is_no_comparison_is_said_to_be_none(
    model_dir: Path, text_file: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "out"
    root.mkdir()
    (root / "comparison.json").write_text(text)
    assert run_command(lambda: command(flags(model_dir, text_file, root, "--resume", "--compare", "ce,logits"))) == 2
    assert "comparison.json is not" in (line := capsys.readouterr().err) and line.count("\n") == 1


def test_one_run_is_not_asked_for_several(tmp_path: Path) -> None:
    from mlx_linearard import distill

    with pytest.raises(UserError, match="call compare_objectives"):
        distill(DistillConfig(compare="relation,ce", output=str(tmp_path / "out")))


def test_all_its_models_are_evaluated_into_its_own_results(made: Path, tmp_path: Path) -> None:
    root = shutil.copytree(made, tmp_path / "out")
    items = tmp_path / "few.jsonl"
    rows = [{"query": f"Question {i}:", "choices": ["the best", "the worst"], "gold": i % 2} for i in range(6)]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(["--run", str(root), "--suite", "choice", "--data", str(items)]) == 0
    assert report([str(root)]) == 0
    results = json.loads((root / "results.json").read_text())
    assert all("choice/few" in results[name] for name in ("native", "scaled", *OBJECTIVES))
    assert "relation vs native" in (root / "report.html").read_text()


# ---------------------------------------------------------------------------------------------------
# What it says


def pieces(mean: float, noise: float, seed: int) -> dict[str, float]:
    values = mean + noise * np.random.default_rng(seed).standard_normal(40)
    return {str(i): float(value) for i, value in enumerate(values)}


def compared(**kl: tuple[float, float]) -> ObjectiveVerdict:
    """A comparison whose objectives have these KLs, each (mean, noise over pieces)."""
    names = [name.replace("_", "+") for name in kl]
    models = {"native": {"kl": pieces(0, 0, 0)}, "scaled": {"kl": pieces(1.6, 0.1, 1)}}
    models |= {name: {"kl": pieces(*kl[key], 2 + i)} for i, (name, key) in enumerate(zip(names, kl, strict=True))}
    value = json.loads(json.dumps(statistics.compare_objectives(models, names).as_json()))
    return ObjectiveVerdict(names, Results(comparisons={HELD_OUT: rows.Comparison.from_json(value, Field("test"))}))


@pytest.mark.parametrize(
    ("kl", "says"),
    [
        ({"relation": (0.4, 0.02), "logits": (0.2, 0.02)}, "logits won back most of what scaling cost, 88%"),
        ({"relation": (0.4, 0.02), "logits": (0.2, 0.02)}, "Behind it: relation, 75% (p < 0.001)"),
        ({"relation": (0.4, 0.02), "logits": (0.2, 0.02)}, "was not worth it here: logits is closer"),
        ({"relation": (0.1, 0.02), "ce": (0.9, 0.02)}, "was worth it here: relation is closer"),
        ({"relation": (0.1, 0.02), "ce": (1.9, 0.02)}, "Behind it: ce, no closer to the native model than the scaled"),
        ({"relation": (0.3, 0.2), "logits": (0.3, 0.2)}, "No different from it beyond chance: "),
        ({"relation_logits": (0.3, 0.2), "logits": (0.3, 0.2)}, "made no difference beyond chance: "),
        ({"relation": (1.9, 0.1), "ce": (1.8, 0.1)}, "None of relation and ce helped"),
    ],
)
def test_the_verdict_follows_from_the_numbers(kl: dict[str, tuple[float, float]], says: str) -> None:
    assert says in " ".join(compared(**kl).sentences())


def test_too_few_pieces_are_said_to_be(made: Path) -> None:
    """A window of 200 tokens makes four pieces of held-out text, too few for a paired test."""
    assert "too few pieces of text to compare it with" in " ".join(verdict(read_run(made)))
