"""Options: a flag wins over the file, which wins over the default; mistakes are told in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlx_linearard.config import DistillConfig, read_yaml, to_yaml
from mlx_linearard.distill.__main__ import parse, parser
from mlx_linearard.errors import UserError


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("factor: 8\nlora-rank: 16\nlearning_rate: 3e-4\nlayers: [0, 5]\n")
    config = parse(["--config", str(file), "--lora-rank", "32"])
    assert (config.factor, config.lora_rank, config.learning_rate, config.layers) == (8.0, 32, 3e-4, "0,5")
    assert config.method == DistillConfig.method


def test_the_resolved_file_reads_back_to_the_same(tmp_path: Path) -> None:
    config = DistillConfig(model="a/b", factor=2.5, steps=7, learning_rate=1e-5, lora_dropout=0.1, layers="0,1")
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
        (["--stepz", "5"], "unrecognized"),
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
    """Each YAML file reads, and so does each run of the study on top of the recipe."""
    examples = Path(__file__).parents[1] / "examples"
    paper = parse(["--config", str(examples / "paper.yaml")])
    assert (paper.objective, paper.method, paper.layers) == ("relation", "linear", "last")
    study = yaml.safe_load((examples / "study" / "study.yaml").read_text())
    for name, options in study.items():
        words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        config = parse(["--config", str(examples / "recipe.yaml"), *words])
        assert all(getattr(config, key) == value for key, value in options.items()), name
