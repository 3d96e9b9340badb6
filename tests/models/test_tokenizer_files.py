"""A tokenizer's files: no code of the model's own, no file outside the directory, and none lost in a copy."""

import json
import os

import pytest
from mlx_linearard.convert.hf import from_hf, scale, to_hf
from tiny import tiny_model

from mlx_linearard.cli import run_command
from mlx_linearard.errors import UserError
from mlx_linearard.evaluate.__main__ import run as evaluate
from mlx_linearard.export.fuse import write_base, write_fused
from mlx_linearard.models.directory import check_config, check_model_dir
from mlx_linearard.models.pair import load_pair
from mlx_linearard.models.tokenizer import check_tokenizer, tokenizer_of
from mlx_linearard.models.tokenizer_files import check_settings


@pytest.fixture
def model(tmp_path):
    return tiny_model(tmp_path / "model")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


EVIL = """
from pathlib import Path
Path(__file__).with_name("ran").write_text("yes")
from transformers import PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast): pass
"""

CODE = {
    "a map": ({"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}, "auto_map"),
    "a map in the old form": ({"auto_map": ["evil.Evil", None]}, "auto_map"),
    "a map to another repository": ({"auto_map": {"AutoTokenizer": ["a/b--evil.Evil", None]}}, "auto_map"),
    "a class": ({"tokenizer_class": "Evil"}, "tokenizer_class 'Evil'"),
    "both": ({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, "auto_map"),
    "a path as a class": ({"tokenizer_class": "evil.Evil"}, "tokenizer_class 'evil.Evil'"),
    "a model as a class": ({"tokenizer_class": "LlamaForCausalLM"}, "tokenizer_class 'LlamaForCausalLM'"),
    "a list as a class": ({"tokenizer_class": ["Evil"]}, "tokenizer_class"),
    "a number as a class": ({"tokenizer_class": 7}, "tokenizer_class '7'"),
}


@pytest.mark.parametrize(("values", "said"), CODE.values(), ids=CODE.keys())
def test_a_tokenizer_that_needs_code_is_refused_by_name(model, monkeypatch, values, said):
    def ask(*_):
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", ask)
    (model / "evil.py").write_text(EVIL)
    change(model / "tokenizer_config.json", **values)
    for load in (check_tokenizer, check_model_dir, lambda path: tokenizer_of(path, {})):
        with pytest.raises(UserError, match=rf"tokenizer_config\.json.*{said}"):
            load(model)
    assert not (model / "ran").exists()


def test_a_map_of_the_models_code_in_config_json_is_not_followed(model):
    """Many repositories have one beside a model that every library knows."""
    (model / "evil.py").write_text(EVIL)
    change(model / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]})
    assert tokenizer_of(model, check_config(model)).encode("a")
    assert not (model / "ran").exists()


def test_the_commands_say_it_in_one_line(model, text_file, tmp_path, capsys):
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    words = ["--model", model, "--suite", "ppl", "--data", text_file, "--lengths", "32", "--out", tmp_path / "o.json"]
    assert run_command(lambda: evaluate([str(word) for word in words])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "auto_map" in error and not (tmp_path / "o.json").exists()


@pytest.mark.parametrize(
    "name",
    ["PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend", "LlamaTokenizer", "LlamaTokenizerFast",
     "GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "GemmaTokenizerFast", "GPTNeoXTokenizerFast",
     "CohereTokenizerFast", None],
)  # fmt: skip
def test_the_classes_of_public_models_are_known(model, name):
    change(model / "tokenizer_config.json", tokenizer_class=name)
    check_settings(model)


OUTSIDE = {
    "absolute": {"tokenizer_file": "/etc/hostname"},
    "above": {"vocab_file": "../other/tokenizer.model"},
    "in a list": {"fast_tokenizer_files": ["tokenizer.json", "../tokenizer.4.0.0.json"]},
    "of another key": {"merges_file": "/tmp/merges.txt"},
    "without the ending": {"vocab": "/tmp/vocab.json"},
    "missing": {"tokenizer_file": "elsewhere.json"},
    "a folder": {"chat_template_file": ".."},
}


@pytest.mark.parametrize("values", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_files_outside_the_directory_are_refused(model, values):
    change(model / "tokenizer_config.json", **values)
    (key,) = values
    with pytest.raises(UserError, match=f"{key} names .* not a file of its directory"):
        check_model_dir(model)


def test_a_named_file_is_that_of_the_directory_and_not_of_the_current_one(model, tmp_path, monkeypatch):
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(other)
    change(model / "tokenizer_config.json", tokenizer_file="tokenizer.json", vocab_file=None)
    assert tokenizer_of(model, {}).decode(tokenizer_of(model, {}).encode("ab")) == "ab"


@pytest.mark.parametrize("name", ["additional_chat_templates/tool_use.jinja", "tokenizer.model", "vocab.txt"])
def test_links_that_lead_out_are_refused(model, tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="leads out of its directory"):
        check_model_dir(model)


# -- copies --

EXTRA = (
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "vocab.txt",
    "spiece.model",
    "tokenizer.tiktoken",
    "special_tokens_map.json",
    "tekken.json",
)


def with_everything(model, window=128):
    for name in EXTRA:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    (model / "tokenizer_helper.py").write_text("raise SystemExit")
    change(model / "tokenizer_config.json", model_max_length=window)
    change(
        model / "tokenizer.json",
        truncation={"direction": "Right", "max_length": window, "strategy": "LongestFirst", "stride": 0},
    )
    (model / "generation_config.json").write_text(json.dumps({"max_length": window, "eos_token_id": 257}))


def limits(directory):
    def value(name, *keys):
        held = json.loads((directory / name).read_text())
        for key in keys:
            held = held[key]
        return held

    return (
        value("tokenizer_config.json", "model_max_length"),
        value("tokenizer.json", "truncation", "max_length"),
        value("generation_config.json", "max_length"),
    )


def copies(model, place):
    """Every way to write a model directory from another, and whether the window grows fourfold."""
    pair = load_pair(model, method="linear", factor=4.0, lora_rank=4)
    write_base(pair, place / "base")
    write_fused(pair, place / "fused")
    return {
        "base": (place / "base", True),
        "fused": (place / "fused", True),
        "scale": (scale(model, place / "scaled", method="yarn", factor=4.0), True),
        "from_hf": (from_hf(model, place / "mlx"), False),
        "to_hf": (to_hf(place / "fused", place / "hf"), True),
    }


def test_copies_lose_no_file_and_follow_the_window(model, tmp_path):
    with_everything(model)
    for name, (made, grown) in copies(model, tmp_path).items():
        assert not [file for file in EXTRA if not (made / file).is_file()], name
        assert not list(made.glob("*.py")), name
        assert limits(made) == ((512, 512, 512) if grown else (128, 128, 128)), name
        assert set(tokenizer_of(made, {}).chat_template) == {"default", "tool_use"}, name
        assert tokenizer_of(made, {}).model_max_length == (512 if grown else 128), name


@pytest.mark.parametrize(
    ("limit", "then"), [(10**30, 10**30), (1e30, 1e30), (512, 512), (4096, 4096), (64, 64), (300, 512)]
)
def test_only_limits_of_the_old_window_change(model, tmp_path, limit, then):
    change(model / "tokenizer_config.json", model_max_length=limit)
    made = scale(model, tmp_path / "scaled", method="linear", factor=4.0)
    assert json.loads((made / "tokenizer_config.json").read_text())["model_max_length"] == then


def test_an_untouched_file_is_copied_byte_for_byte(model, tmp_path):
    made = scale(model, tmp_path / "scaled", method="linear", factor=4.0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (made / name).read_bytes() == (model / name).read_bytes()


# -- damage --


def panicking():
    """Changes of tokenizer.json at which the tokenizers library's Rust code panics, when it loads or encodes."""
    chars = {"type": "Precompiled", "precompiled_charsmap": "CAAAAP//////////"}  # a table that points outside itself
    missing = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": missing, "pair": [], "special_tokens": {}}
    return {
        "charsmap, loading": {"normalizer": {**chars, "precompiled_charsmap": ""}},
        "charsmap, encoding": {"normalizer": chars},
        "template, encoding": {"post_processor": template},
        "no length, encoding": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    }


@pytest.mark.parametrize("values", panicking().values(), ids=panicking().keys())
def test_a_tokenizer_that_panics_is_one_line(model, capfd, values):
    change(model / "tokenizer.json", **values)
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        check_tokenizer(model)
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"  # no backtrace, and standard error is back


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"", b"[1]", b"{", b'{"a": NaN}', b"1" * 5000, b"[" * 100_000, b'{"x": "\\ud800"}']
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_damaged_json_is_one_line_with_its_name(model, name, content):
    (model / name).write_bytes(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
        check_model_dir(model)
    assert "\n" not in str(caught.value)
