"""The words that users of mlx-lm know, one name for one thing, the one command, and the public names."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from test_rooms import MODULES

import mlx_linearard
from mlx_linearard.__main__ import COMMANDS, overview
from mlx_linearard.cli import Parser
from mlx_linearard.config import OTHER, SAME, DistillConfig, read_yaml, read_yaml_and_notes
from mlx_linearard.distill.__main__ import COMMON, parse, parser
from mlx_linearard.errors import UserError

# A file as mlx-lm's own example, mlx_lm/examples/lora_config.yaml, has it.
LORA = """
model: "mlx_model"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config: {adamw: {}}
data: "folder"
seed: 0
num_layers: 16
batch_size: 4
iters: 1000
val_batches: 25
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "adapters"
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
"""

# ---------------------------------------------------------------------------------------------------
# mlx-lm's names


def test_a_file_of_mlx_lm_is_read_where_it_means_the_same(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text(LORA)
    options, notes = read_yaml_and_notes(tmp_path / "lora.yaml")
    assert options == {
        "model": "mlx_model", "fine_tune_type": "lora", "data": "folder", "seed": 0, "batch_size": 4, "steps": 1000,
        "learning_rate": 1e-5, "eval_every": 200, "save_every": 100, "seq_len": 2048, "lora_rank": 8,
        "lora_scale": 20.0, "lora_dropout": 0.0, "grad_accum": 1,
    }  # fmt: skip
    assert DistillConfig(**options).steps == 1000
    named = [note.removeprefix(f"{tmp_path / 'lora.yaml'}: ").partition(" is not used: ")[0] for note in notes]
    assert named == [
        "adapter_path",
        "num_layers",
        "steps_per_report",
        "test_batches",
        "val_batches",
        "lora_parameters.keys",
    ]
    assert parse(["--config", str(tmp_path / "lora.yaml"), "--max-seq-length", "512"]).seq_len == 512


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("iters: 5\nsteps: 5", "iters and steps are the same option: give one of them"),
        ("iters: many", "steps must be a int, not 'many'"),
        ("resume_adapter_file: a.safetensors", "resume_adapter_file is not read: a run continues with --resume"),
        ("hf_dataset: {path: a/b}", r"hf_dataset is not read: give --data hf:NAME\[:CONFIG\]"),
        ("lora_parameters: 8", "lora_parameters must hold `name: value` lines"),
        ("iters: 5\nlora_rnak: 8", "did you mean lora_rank"),
    ],
)
def test_wrong_files_of_mlx_lm_are_one_line(tmp_path: Path, body: str, says: str) -> None:
    (tmp_path / "c.yaml").write_text(body)
    with pytest.raises(UserError, match=says):
        read_yaml(tmp_path / "c.yaml")


def test_iterations_of_mlx_lm_are_passes(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("iters: 100\ngrad_accumulation_steps: 4\n")
    assert read_yaml(tmp_path / "c.yaml") == {"steps": 25, "grad_accum": 4}
    assert parse(["--iters", "100", "--grad-accumulation-steps", "4"]).steps == 25
    assert parse(["--iters", "7", "--steps-per-eval", "3"]) == DistillConfig(steps=7, eval_every=3)


@pytest.mark.parametrize("name", OTHER)
def test_other_flags_of_mlx_lm_name_ours(name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    for words in ([flag], [flag, "3"]):
        with pytest.raises(UserError, match=f"{flag} is an option of mlx_lm.lora: ") as error:
            parse(words)
        assert OTHER[name] in str(error.value)


def test_every_option_of_mlx_lm_has_a_meaning_or_an_answer() -> None:
    from mlx_lm.lora import CONFIG_DEFAULTS

    ours = {item.name for item in dataclasses.fields(DistillConfig)} | {"config", "lora_parameters"}
    assert set(CONFIG_DEFAULTS) - ours - set(SAME) - set(OTHER) == set()
    assert set(SAME.values()) <= ours


# ---------------------------------------------------------------------------------------------------
# Help


def test_help_shows_the_common_options_and_help_all_every_one(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["-h"], ["--help-all"]):
        with pytest.raises(SystemExit) as stop:
            parse(words)
        assert stop.value.code == 0
        text = capsys.readouterr().out
        shown = {line.split()[0] for line in text.splitlines() if line.startswith("  -")}
        assert len(shown) >= 45 if words == ["--help-all"] else len(shown) == len(COMMON) + 1
        assert "--help-all" in text and "--iters" not in text and "--val-batches" not in text


def test_every_option_has_its_default_or_its_rule_in_the_help() -> None:
    actions = {action.dest: action for action in parser()._actions if action.help != "==SUPPRESS=="}
    for item in dataclasses.fields(DistillConfig):
        if item.default is False:
            continue
        assert "default" in (actions[item.name].help or ""), item.name


# ---------------------------------------------------------------------------------------------------
# One name for one thing


def test_lengths_are_lengths_in_every_command(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("lengths: [64, 128]")
    assert parse(["--config", str(tmp_path / "c.yaml")]).eval_lengths == "64,128"
    assert parse(["--lengths", "64"]) == parse(["--eval-lengths", "64"]) == DistillConfig(eval_lengths="64")


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("export", ["--run", "{}/no", "--output", "{}/out"], "no"),
        ("export", ["--run", "{}/no", "--to", "{}/out"], "no"),
        ("export", ["--run", "{}/no"], "--output"),
        ("report", ["--run", "{}/no"], "no"),
        ("report", ["{}/no"], "no"),
        ("report", ["{}/no", "--run", "{}/no"], "give one run"),
        ("report", [], "give one run"),
        ("doctor", ["--out", "{}"], "--output is the folder"),
        ("doctor", ["--output", "{}"], "--output is the folder"),
    ],
)
def test_output_and_run_are_the_names_and_earlier_ones_stay(
    tmp_path: Path, command: str, arguments: list[str], says: str
) -> None:
    run = importlib.import_module(f"mlx_linearard.{command}.__main__").run
    with pytest.raises(UserError, match=says):
        run([word.format(tmp_path) for word in arguments])


# ---------------------------------------------------------------------------------------------------
# One command


def start(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mlx_linearard", *words], capture_output=True, text=True)


def test_one_command_runs_the_others() -> None:
    version = start("--version")
    assert (version.returncode, version.stdout) == (0, f"mlx_linearard {mlx_linearard.__version__}\n")
    passed_on = start("distill", "--factor", "1")
    assert passed_on.returncode == 2 and "--factor 1.0: must be above 1" in passed_on.stderr


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ([], 0, overview()),
        (["distil"], 2, "error: there is no command distil: choose from distill"),
        (["mlx_linearard.distill", "--factor", "1"], 2, "--factor 1.0: must be above 1"),
    ],
)
def test_the_command_knows_its_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], status: int, says: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["mlx_linearard", *words])
    with pytest.raises(SystemExit) as stop:
        mlx_linearard.__main__.main()
    told = capsys.readouterr()
    assert stop.value.code == status and says in (told.err if status else told.out)
    assert all(f"  {name} " in overview() for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mlx_linearard", command, "--help"])
    with pytest.raises(SystemExit) as stop:
        mlx_linearard.__main__.main()
    assert stop.value.code == 0 and f"mlx_linearard.{command}" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------
# The library


def test_the_public_names_are_there() -> None:
    for name in mlx_linearard.__all__:
        assert getattr(mlx_linearard, name).__module__.startswith("mlx_linearard") or isinstance(
            getattr(mlx_linearard, name), ModuleType
        )
    assert {"Listener", "Result", "UserError"} <= set(mlx_linearard.__all__) <= set(dir(mlx_linearard))


def test_the_options_document_their_fields() -> None:
    text = DistillConfig.__doc__ or ""
    for item in dataclasses.fields(DistillConfig):
        assert f"    {item.name} (" in text and item.metadata["help"] in text


def test_a_pair_loads_from_the_hub_by_name(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(model_dir))
    pair = mlx_linearard.load_pair("owner/tiny", method="yarn", factor=2.0)
    assert asked == ["owner/tiny"] and pair.path == model_dir
    with pytest.raises(UserError, match="nowhere is not a model directory"):
        mlx_linearard.load_pair("nowhere", method="yarn", factor=2.0)


def test_every_example_of_a_docstring_is_right() -> None:
    tried = 0
    for name in MODULES:
        if name.rpartition(".")[2] == "__main__":
            continue
        module = importlib.import_module(f"mlx_linearard.{name}".rstrip("."))
        outcome = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
        assert outcome.failed == 0, name
        tried += outcome.attempted
    assert tried >= 8


def test_the_recipes_and_the_written_file_need_no_notes() -> None:
    examples = Path(__file__).parents[1] / "examples"
    for path in examples.glob("*.yaml"):
        if isinstance(yaml.safe_load(path.read_text()), dict):
            assert read_yaml_and_notes(path)[1] == []


def test_a_parser_without_common_options_explains_all(capsys: pytest.CaptureFixture[str]) -> None:
    command = Parser("program")
    command.add_argument("--thing", help="a thing")
    with pytest.raises(SystemExit):
        command.parse_args(["--help"])
    assert "a thing" in capsys.readouterr().out
