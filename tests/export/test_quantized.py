"""What quantizing an export cost: measured as defined, written into results and card, and its size told before."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load_model
from tiny import tiny_model
from tiny_runs import small

from mlx_linearard import distill
from mlx_linearard.errors import UserError
from mlx_linearard.export.__main__ import run as export_command
from mlx_linearard.export.formats import export
from mlx_linearard.report.load import read_run


def log_softmax(model: Any, window: list[int]) -> np.ndarray:
    logits = np.array(model(mx.array([window[:-1]]))[0].astype(mx.float32), np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def kl(teacher: Any, student: Any, windows: list[list[int]]) -> float:
    """The definition, in float64: the mean over all positions of KL(teacher || student)."""
    parts = []
    for window in windows:
        a, b = log_softmax(teacher, window), log_softmax(student, window)
        parts.append((np.exp(a) * (a - b)).sum(-1))
    return float(np.mean(parts))


def weight_bytes(folder: Path) -> int:
    return sum(array.nbytes for array in mx.load(str(folder / "model.safetensors")).values())


def test_the_cost_is_measured_and_written(run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert export_command(["--run", str(run_copy), "--to", str(out), "-q", "--q-group-size", "32"]) == 0
    printed = capsys.readouterr().out.splitlines()
    results = json.loads((run_copy / "results.json").read_text())
    restored, alike = results["restored-4bit-g32"], results["native-4bit-g32"]
    (length, windows), *_ = json.loads((run_copy / "held_out_tokens.json").read_text()).items()
    base = Path(str(read_run(run_copy).config["model"]))
    native, quantized, fused = (load_model(path)[0] for path in (base, out, run_copy / "model"))
    assert restored["kl"] == pytest.approx(kl(native, quantized, windows), rel=1e-4)
    assert restored["kl_to_restored"] == pytest.approx(kl(fused, quantized, windows), rel=1e-4)
    native_quantized = load_model(base)[0]
    nn.quantize(native_quantized, group_size=32, bits=4)
    assert alike["kl"] == pytest.approx(kl(native, native_quantized, windows), rel=1e-4)
    assert restored["perplexity"].keys() == {length} and restored["kl_to_restored"] > 1e-4
    told = re.search(r"(\S+) MB of weights instead of (\S+) MB \(the base model has (\S+) MB\)", printed[0])
    assert told and float(told[1]) == pytest.approx(weight_bytes(out) / 1e6, abs=0.06)
    assert float(told[2]) == pytest.approx(weight_bytes(run_copy / "model") / 1e6, abs=0.06)
    card, sentence = (out / "README.md").read_text(), f"Quantizing cost {restored['kl_to_restored']:.4f} nats per token"
    assert sentence in card and any(line.startswith(sentence) for line in printed)
    assert f"quantized alike has {alike['kl']:.4f}" in card and "base_model_relation: quantized" in card
    assert "| restored-4bit-g32 |" in card and "| native-4bit-g32 |" in card and f"{restored['kl']:.4f} ±" in card
    assert "restored-4bit-g32" in (run_copy / "report.html").read_text()


def test_a_quantized_base_gives_a_model_of_its_size(tmp_path: Path, text_file: Path) -> None:
    """QLoRA: the fused model keeps q, k and v unquantized; -q takes the base's own bits and measures that."""
    base = tiny_model(tmp_path / "base", bits=4, dtype="float16")
    distill(small(base, text_file, tmp_path / "run", steps=2))
    said: list[str] = []
    out = export(tmp_path / "run", tmp_path / "out", quantize=True, progress=said.append)
    assert weight_bytes(tmp_path / "run" / "model") > weight_bytes(base) == weight_bytes(out)
    assert json.loads((out / "config.json").read_text())["quantization"]["group_size"] == 32
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["restored-4bit-g32"]["kl_to_restored"] > 0 and "native-4bit-g32" not in results
    assert any("The native model of this run is quantized itself." in line for line in said)
    plain = export(tmp_path / "run", tmp_path / "plain", progress=said.append)
    assert any("larger than the base: with -q it has 4 bits in groups of 32" in line for line in said)
    assert weight_bytes(plain) > weight_bytes(base)
    both = export(tmp_path / "run", tmp_path / "both", format="adapters")  # the other way: adapters beside the base
    assert weight_bytes(both / "base") == weight_bytes(base)


def test_a_large_cost_points_to_learned_quantization(run_copy: Path, tmp_path: Path) -> None:
    said: list[str] = []
    export(run_copy, tmp_path / "out", quantize=True, q_bits=2, q_group_size=32, progress=said.append)
    assert "--learn 160 --overwrite trains the scales" in said[-1]


def test_learned_quantization_loses_less_at_the_same_size(
    run_copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By mlx-lm's own DWQ, measured beside the plain quantization; stock mlx-lm loads what it wrote."""
    quantized = {"quantize": True, "q_bits": 2, "q_group_size": 32}
    plain = export(run_copy, tmp_path / "plain", **quantized)
    learned = export(run_copy, tmp_path / "learned", learn=64, **quantized)
    assert capfd.readouterr() == ("", "")
    results = json.loads((run_copy / "results.json").read_text())
    before, after = (results[name]["kl_to_restored"] for name in ("restored-2bit-g32", "restored-2bit-g32-learned"))
    assert 0 < after < before
    assert weight_bytes(learned) == weight_bytes(plain) and load_model(learned)[0]
    one, other = (mx.load(str(folder / "model.safetensors")) for folder in (plain, learned))
    changed = {name.rpartition(".")[2] for name in one if not mx.array_equal(one[name], other[name]).item()}
    assert changed == {"scales", "biases"}
    assert "trained on 64 texts" in (learned / "README.md").read_text()
    with pytest.raises(UserError, match=r"--learn 999999 needs \d+ tokens and the run's data have \d+: give at most"):
        export(run_copy, tmp_path / "more", learn=999999, **quantized)
    assert not (tmp_path / "more").exists()
    with pytest.raises(UserError, match="--learn trains a quantized model: it needs -q"):
        export(run_copy, tmp_path / "more", learn=1)


def test_what_cannot_be_measured_is_said(run_copy: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (run_copy / "held_out_tokens.json").write_text("{")
    with pytest.raises(UserError, match=r"held_out_tokens\.json"):
        export(run_copy, tmp_path / "out", quantize=True, progress=said.append)
    (run_copy / "held_out_tokens.json").unlink()
    out = export(run_copy, tmp_path / "out", quantize=True, overwrite=True, progress=said.append)
    assert any("not measured: the run kept no held-out text" in line for line in said)
    assert "What that cost was not measured" in (out / "README.md").read_text()
    assert "restored-4bit" not in json.loads((run_copy / "results.json").read_text())
    out = export(run_copy, tmp_path / "more", quantize=True, measure=False)
    assert "What that cost was not measured" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "text", ['{"8": [[1, 2]]}', '{"x": []}', "[]", '{"8": []}', '{"1": [[1, -2]]}', '{"1": [[1, 9e9]]}']
)
def test_damaged_windows_are_refused_by_name(run_copy: Path, tmp_path: Path, text: str) -> None:
    (run_copy / "held_out_tokens.json").write_text(text)
    with pytest.raises(UserError, match=r"held_out_tokens\.json"):
        export(run_copy, tmp_path / "out", quantize=True)
