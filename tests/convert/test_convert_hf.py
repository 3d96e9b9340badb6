"""Hugging Face directories to mlx-lm and back, scaled copies, verify, and the command."""

import json
import os
import subprocess
import sys

import converter_models as tiny
import mlx.core as mx
import numpy as np
import pytest
from mlx_linearard.convert.__main__ import run
from mlx_linearard.convert.hf import from_hf, scale, to_hf
from mlx_linearard.convert.verify import verify
from transformers import AutoTokenizer

from mlx_linearard.cli import run_command
from mlx_linearard.errors import UserError
from mlx_linearard.models import save as write
from mlx_linearard.rope import normalise, scale_rope


def arrays(directory):
    found = {}
    for path in sorted(directory.glob("model*.safetensors")):
        found.update(mx.load(str(path)))
    return found


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert np.array_equal(np.array(a[name].view(mx.uint8)), np.array(b[name].view(mx.uint8))), name


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_weights_survive_the_round_trip_bit_for_bit(tmp_path, kind):
    settings = tiny.config(kind)
    stored = tiny.weights(settings, dtype=mx.bfloat16)
    source = tiny.write(tmp_path / "source", settings, stored, shards=3)
    ours = from_hf(source, tmp_path / "ours")
    back = to_hf(ours, tmp_path / "back")
    same_bits(arrays(ours), stored)
    same_bits(arrays(back), stored)
    assert (ours / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_converting_twice_equals_once(tmp_path):
    source = tiny.write(tmp_path / "source")
    once = from_hf(source, tmp_path / "once")
    twice = from_hf(once, tmp_path / "twice")
    assert tiny.files(once) == tiny.files(twice)
    hf = to_hf(once, tmp_path / "hf")
    assert tiny.files(to_hf(hf, tmp_path / "hf2")) == tiny.files(hf)


@pytest.mark.parametrize("kind", [*tiny.FAMILIES, "gemma3_text", "olmo3"])
@pytest.mark.parametrize("method", [None, "linear", "ntk"])
def test_both_generations_of_configs_give_the_same_directory(tmp_path, kind, method):
    settings = tiny.config(kind, num_hidden_layers=6 if kind == "gemma3_text" else 4, sliding_window=None)
    if kind in ("gemma3_text", "olmo3"):
        settings["sliding_window"] = 32
    both = scale_rope(settings, method, 4.0) if method else normalise(settings)
    gone = ("rope_scaling", "rope_theta", "rope_local_base_freq")
    old = {key: value for key, value in both.items() if key != "rope_parameters"}
    new = {key: value for key, value in both.items() if key not in gone}
    stored = tiny.weights(both)
    a = from_hf(tiny.write(tmp_path / "old", old, stored), tmp_path / "a")
    b = from_hf(tiny.write(tmp_path / "new", new, stored), tmp_path / "b")
    assert tiny.files(a) == tiny.files(b)


def test_a_v5_config_keeps_its_theta_and_scaling(tmp_path):
    """Stock mlx-lm reads theta 10000 and no scaling from the source, without a warning."""
    scaled = scale_rope(tiny.config(rope_theta=500000.0), "llama3", 4.0)
    v5 = {key: value for key, value in scaled.items() if key not in ("rope_scaling", "rope_theta")}
    source = tiny.write(tmp_path / "source", v5, tiny.weights(scaled))
    right = tiny.logits(tiny.write(tmp_path / "right", scaled, tiny.weights(scaled)))
    assert np.abs(tiny.logits(source) - right).max() > 0.1
    np.testing.assert_array_equal(tiny.logits(from_hf(source, tmp_path / "ours")), right)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_that_of_every_float(tmp_path, dtype):
    ours = from_hf(tiny.write(tmp_path / "source"), tmp_path / "ours", dtype=dtype)
    assert {str(a.dtype) for a in arrays(ours).values()} == {f"mlx.core.{dtype}"}
    assert json.loads((ours / "config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64)])
def test_quantized_as_mlx_quantizes_and_back(tmp_path, bits, group):
    settings = tiny.config()
    stored = tiny.weights(settings)
    source = tiny.write(tmp_path / "source", settings, stored)
    ours = from_hf(source, tmp_path / "ours", quantize=True, q_bits=bits, q_group_size=group)
    held = arrays(ours)
    name = "model.layers.1.mlp.up_proj"
    expected = mx.quantize(stored[f"{name}.weight"], group_size=group, bits=bits)
    for leaf, value in zip(("weight", "scales", "biases"), expected, strict=True):
        assert mx.array_equal(held[f"{name}.{leaf}"], value)
    back = arrays(to_hf(ours, tmp_path / "back"))
    assert mx.array_equal(back[f"{name}.weight"], mx.dequantize(*expected, group_size=group, bits=bits))
    assert "quantization" not in json.loads((tmp_path / "back" / "config.json").read_text())
    error = np.abs(tiny.logits(ours) - tiny.logits(tmp_path / "back")).max()
    assert error < 1e-4  # the same numbers, multiplied by another kernel
    with pytest.raises(UserError, match="already quantized"):
        from_hf(ours, tmp_path / "again", quantize=True)


def test_shards_are_written_and_indexed(tmp_path):
    source = tiny.write(tmp_path / "source")
    ours = from_hf(source, tmp_path / "ours", shard_bytes=60_000)
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in ours.glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    same_bits(arrays(ours), arrays(source))
    np.testing.assert_array_equal(tiny.logits(ours), tiny.logits(source))


def test_scale_links_the_weights_and_survives_the_source(tmp_path):
    source = from_hf(tiny.write(tmp_path / "source"), tmp_path / "ours")
    scaled = scale(source, tmp_path / "scaled", method="linear", factor=4.0)
    assert (source / "model.safetensors").samefile(scaled / "model.safetensors")
    assert json.loads((scaled / "config.json").read_text())["rope_scaling"]["factor"] == 4.0
    expected = tiny.logits(scaled)
    assert np.abs(expected - tiny.logits(source)).max() > 0.1
    for path in source.iterdir():
        path.unlink()
    np.testing.assert_array_equal(tiny.logits(scaled), expected)


def test_scale_copies_where_it_cannot_link(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    scaled = scale(tiny.write(tmp_path / "source"), tmp_path / "scaled", method="yarn", factor=2.0)
    same_bits(arrays(scaled), arrays(tmp_path / "source"))


def test_verify_finds_what_differs(tmp_path):
    source = from_hf(tiny.write(tmp_path / "source"), tmp_path / "ours")
    same = verify(source, tmp_path / "source")
    assert same.logits == 0 and same.agreement == 1 and not same.configs
    scaled = verify(source, scale(source, tmp_path / "scaled", method="linear", factor=4.0))
    assert scaled.logits > 0.1
    assert scaled.frequencies["full_attention"] == pytest.approx(3.0)
    assert set(scaled.configs) == {"max_position_embeddings", "rope_scaling", "rope_parameters"}
    text = "\n".join(scaled.lines())
    assert "max_position_embeddings: 64 / 256" in text


def test_the_tokenizer_loads(tmp_path):
    ours = from_hf(tiny.write(tmp_path / "source"), tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(ours)
    assert tokenizer.decode(tokenizer.encode("Aß 12")) == "Aß 12"


def test_writing_stops_at_a_weight_that_is_not_finite(tmp_path):
    stored = tiny.weights(tiny.config())
    stored["model.norm.weight"] = mx.full((64,), float("nan"))
    source = tiny.write(tmp_path / "source", tiny.config(), stored)
    with pytest.raises(UserError, match=r"model\.norm\.weight .*not finite"):
        from_hf(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists() and len(list(tmp_path.iterdir())) == 1
    stored["model.norm.weight"] = mx.full((64,), 1e30)
    source = tiny.write(tmp_path / "large", tiny.config(), stored)
    with pytest.raises(UserError, match="not finite"):
        from_hf(source, tmp_path / "ours", dtype="float16")


def test_an_interrupted_conversion_leaves_nothing(tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    source = tiny.write(tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        from_hf(source, tmp_path / "ours", shard_bytes=60_000, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def command(*arguments):
    return run_command(lambda: run([str(argument) for argument in arguments]))


def test_the_command_converts(tmp_path):
    source = tiny.write(tmp_path / "source")
    line = ["from-hf", source, tmp_path / "ours", "-q", "--q-bits", "8", "--q-group-size", "32"]
    module = [sys.executable, "-m", "mlx_linearard.convert", *map(str, line)]
    done = subprocess.run(module, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["quantization"]["bits"] == 8
    assert command("verify", tmp_path / "ours", source) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("from-hf", "source", "kept"), "already exists"),
        (("from-hf", "nothing", "x"), "not a model directory"),
        (("scale", "source", "x", "--factor", "0.5"), "greater than 1"),
        (("scale", "source", "x"), "--factor"),
        (("melt", "source", "x"), "melt"),
        (("to-hf", "source", "source", "--overwrite"), "source is the source source"),
        (("from-hf", "source", "x", "-q", "--q-bits", "7"), "7 bits"),
        (("from-gguf", "source/model.safetensors", "x"), "not a GGUF file"),
        (("to-peft", "source", "x"), "adapter_config.json does not exist"),
        (("verify", "source", "kept"), "kept/config.json does not exist"),
        (("verify", "x" * 300, "source"), "File name too long"),
        (("to-peft", "x" * 300, "x"), "File name too long"),
        (("from-peft", "y/" * 3000, "x"), "File name too long"),
        (("from-gguf", "x" * 300, "x"), "File name too long"),
        (("from-gguf", "source", "x"), "Is a directory"),
        (("from-gguf", "/dev/zero", "x"), "not a GGUF file"),
        (("from-hf", "source", "x" * 300), "File name too long"),
        (("from-hf", "source", "loop"), "loop"),
        (("from-hf", "source", "loop", "--overwrite"), "is a link"),
        (("verify", "source", "source", "--tokens", "٣"), "not a whole number"),
    ],
)
def test_the_command_complains_in_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path / "source")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    assert command(*arguments) == 2
    told = capsys.readouterr()
    assert said in told.err and told.err.count("\n") == 1 and not told.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "loop", "source"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("from-hf", "models/llama", "models", "--overwrite"), "models contains the source models/llama"),
        (("scale", "models/llama", "models", "--factor", "2", "--overwrite"), "models contains the source"),
        (("to-hf", "models/llama", "way/..", "--overwrite"), "contains the source"),
        (("from-hf", "models/llama", "other", "--overwrite"), "other has no valid file .mlx_linearard"),
        (("from-hf", "models/llama", "way", "--overwrite"), "way is a link"),
        (("from-hf", "models/llama", "ours", "--overwrite"), "ours holds notes.txt"),
        (("from-hf", "models/llama", "link", "--overwrite"), "link is a link"),
        (("from-hf", "models/llama", ".", "--overwrite"), ". is the current directory"),
        (("from-hf", "models/llama", "..", "--overwrite"), ".. contains the current directory"),
        (("from-hf", "models/llama", "models/notes.txt", "--overwrite"), "notes.txt is a file"),
    ],
)
def test_overwrite_deletes_nothing_that_this_tool_did_not_write(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path / "models" / "llama")
    (tmp_path / "models" / "notes.txt").write_text("precious")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "way").symlink_to("models/llama")
    (tmp_path / "link").symlink_to("other")
    assert command("from-hf", "models/llama", "ours") == 0
    (tmp_path / "ours" / "notes.txt").write_text("precious")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert command(*arguments) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_overwrite_replaces_an_earlier_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path / "source")
    for factor in ("2", "4"):
        assert command("scale", "source", "out", "--factor", factor, "--overwrite") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]["factor"] == 4.0
    assert command("from-hf", "source", "out", "--overwrite") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"] is None


def test_the_written_header_is_aligned_and_covers_the_file(tmp_path):
    values = {"b": mx.zeros((3,), dtype=mx.uint8), "a": mx.ones((5,), dtype=mx.bfloat16), "c": mx.arange(7)}
    write.write_safetensors(tmp_path / "x.safetensors", [write.lazy(k, v) for k, v in values.items()])
    data = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert max(entry["data_offsets"][1] for name, entry in header.items() if name in values) == len(data) - 8 - length
    for name, value in mx.load(str(tmp_path / "x.safetensors")).items():
        assert mx.array_equal(value, values[name])
