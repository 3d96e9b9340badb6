"""Options: a flag wins over the file, which wins over the default; mistakes are told in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlx_linearard.cli import run_command
from mlx_linearard.config import DistillConfig, read_yaml, to_yaml
from mlx_linearard.distill.__main__ import parse, parser
from mlx_linearard.errors import UserError


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("factor: 8\nlora-rank: 16\nlearning_rate: 3e-4\nobjective: relation\nlayers: [0, 5]\n")
    config = parse(["--config", str(file), "--lora-rank", "32"])
    assert (config.factor, config.lora_rank, config.learning_rate, config.layers) == (8.0, 32, 3e-4, "0,5")
    assert config.method == DistillConfig.method


def test_the_resolved_file_reads_back_to_the_same(tmp_path: Path) -> None:
    config = DistillConfig(model="a/b", factor=2.5, steps=7, lora_dropout=0.1, relations="qk", objective="relation")
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert DistillConfig(**read_yaml(tmp_path / "c.yaml")) == config


def test_the_recipes_are_what_the_readme_says_of_them() -> None:
    """144 steps of 8192 tokens, and nothing that ties a recipe to one machine's files."""
    examples = Path(__file__).parents[1] / "examples"
    recipe = parse(["--config", str(examples / "recipe.yaml"), "--method", "linear"])
    assert (recipe.steps, recipe.seq_len, recipe.grad_accum, recipe.method) == (144, 2048, 4, "linear")
    assert recipe.model is recipe.data is None and recipe.output == DistillConfig.output


def test_every_option_is_in_the_help() -> None:
    text = parser().format_help()
    for item in dataclasses.fields(DistillConfig):
        assert f"--{item.name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--factor", "1"], "above 1"),
        (["--factor", "nan"], "finite"),
        (["--factor", "four"], "invalid float"),
        (["--method", "su"], "linear, ntk, yarn, llama3"),
        (["--objective", "mse"], "relation"),
        (["--layers", "first"], "0,5,11"),
        (["--relations", "qq"], "each once"),
        (["--lora-dropout", "1"], "below 1"),
        (["--learning-rate", "inf"], "finite"),
        (["--seq-len", "0"], "above 0"),
        (["--steps", "5", "--tokens", "100"], "one of them"),
        (["--resume", "--overwrite"], "one of them"),
        (["--stepz", "5"], "unrecognized arguments: --stepz 5; did you mean --steps"),
        (["--modle", "a"], "did you mean --model"),
        (["--xyzzy"], "unrecognized arguments: --xyzzy; see"),
        (["--config", "/nonexistent.yaml"], "does not exist"),
    ],
)
def test_wrong_flags(arguments: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse(arguments)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("lora_rnak: 3", "did you mean lora_rank"),
        ("xyzzy: 3", "--help"),
        ("lora_rank: big", "must be a int"),
        ("lora_rank: true", "must be a int"),
        ("factor: .nan", "not finite"),
        ("factor: [4]", "must be a float"),
        ("- factor", "`option: value`"),
        ("factor: {", "not valid YAML"),
        ("factor: 0.5", "above 1"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_wrong_files(tmp_path: Path, body: str, says: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(body)
    with pytest.raises(UserError, match=says):
        parse(["--config", str(file)])


@given(st.text(max_size=200))
def test_no_yaml_raises_anything_but_our_error(tmp_path_factory: pytest.TempPathFactory, body: str) -> None:
    file = tmp_path_factory.mktemp("yaml") / "c.yaml"
    file.write_text(body, encoding="utf-8", errors="surrogatepass")
    try:
        DistillConfig(**read_yaml(file))
    except UserError as error:
        assert str(error)


def test_every_example_is_a_valid_file() -> None:
    """Each YAML file reads, and so does each run of each study on top of the recipe."""
    examples = Path(__file__).parents[1] / "examples"
    paper = parse(["--config", str(examples / "paper.yaml")])
    assert (paper.objective, paper.method, paper.layers, paper.long_weight) == ("relation", "linear", "last", 0.0)
    for name in ("method", "objective", "long_weight"):  # whatever the defaults are
        assert name in read_yaml(examples / "paper.yaml")
    for file in (examples / "study").glob("*.yaml"):
        study = yaml.safe_load(file.read_text())
        for name, own in study["runs"].items():
            options = {key: value for key, value in {**study["shared"], **own}.items() if key != "evaluate"}
            if options.get("method") == "native" or options.get("steps") == 0:
                continue
            words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
            config = parse(["--config", str(examples / "recipe.yaml"), *words])
            assert all(getattr(config, key) == value for key, value in options.items()), name


DIGITS = "9" * 5000


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", DIGITS],
        ["--seed", DIGITS],
        ["--factor", DIGITS],
        ["--factor", "1e308"],
        ["--factor", "٤"],
        ["--steps", "٤"],
        ["--steps", "²"],
        ["--steps", "4.0"],
        ["--steps", "1_000"],
        ["--steps", str(2**31)],
        ["--steps", str(2**63)],
        ["--tokens", str(2**63)],
        ["--seed", str(2**64)],
        ["--batch-size", "-1"],
        ["--workspace", str(2**40)],
        ["--layers", "²"],
        ["--layers", "٤"],
        ["--layers", DIGITS],
        ["--layers", "1," * 3000 + "²"],
        ["--eval-lengths", "٤٤"],
        ["--eval-lengths", DIGITS],
        ["--model", "caf\udce9"],
        ["--output", "a\0b"],
        ["--objective", "ce" * 5000],
        ["--config", "/proc/self/mem"],
        ["--config", "/dev/zero"],
        ["--config", "x" * 5000],
        ["--config", "/"],
    ],
    ids=lambda words: f"{words[0]}-{ascii(words[1])[:12]}",
)
def test_values_beyond_reason_are_one_short_line(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: parse(arguments) and 0) == 2
    line = capfd.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert len(line) < 400 or arguments[0] == "--config"


@pytest.mark.parametrize(
    "body",
    [
        f"steps: {DIGITS}",
        f"seed: -{DIGITS}",
        f"factor: {DIGITS}",
        f"? {DIGITS}\n: 1",
        f"layers: [1, {DIGITS}]",
        "steps: 2147483648",
        "tokens: 9223372036854775808",
        "factor: .inf",
        "factor: '٤'",
        "layers: ['²']",
        "eval_lengths: ٤٤",
        "steps: " + "[" * 100_000,
        "a: &a [x]\nb: *a",
        "model: !!binary aGVsbG8=",
        "model: !custom x",
        "steps: !!python/name:os.system",
        'model: "\\ud800"',
        'model: "a\\0b"',
        "output: null",
        "model: 2020-01-01",
        "? [steps]\n: 4",
        "steps: 4\n---\nsteps: 5",
    ],
    ids=lambda body: ascii(body)[1:25],
)
def test_files_beyond_reason_are_one_short_line(tmp_path: Path, body: str, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(body, encoding="utf-8")
    assert run_command(lambda: parse(["--config", str(file)]) and 0) == 2
    line = capfd.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and len(line) < 600


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xef\xbb\xbfsteps: 7\n")
    assert parse(["--config", str(file)]).steps == 7


@pytest.mark.parametrize(
    "change", [{"steps": "5"}, {"steps": 5.0}, {"model": 3}, {"resume": 1}, {"factor": "4"}], ids=str
)
def test_a_value_of_another_type_is_refused_in_python_too(change: dict) -> None:
    with pytest.raises(UserError, match=r"must (be a|have)"):
        DistillConfig(**change)


@pytest.mark.parametrize("option", [{"layers": "all"}, {"relations": "q"}, {"relation_weight": 2.0}])
def test_options_of_relations_need_relations(option: dict) -> None:
    with pytest.raises(UserError, match=r"--\w+.* needs an objective with relations, .* not logits"):
        DistillConfig(objective="logits", **option)
    assert DistillConfig(objective="relation+logits", **option)
    assert DistillConfig(compare="relation,logits", **option)
