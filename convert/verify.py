"""Compares two models on the same tokens: how far their logits differ, and which settings differ."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..files import reading
from ..models.directory import check_config, check_model_dir, path_for_mlx_lm, resolve
from ..rope import inverse_frequencies
from .gguf import from_gguf

# Settings without an effect on the logits.
UNIMPORTANT = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "auto_map")
SEED = 0


@dataclass(frozen=True)
class Verification:
    """How far two models differ.

    logits       the largest absolute difference over all positions and the vocabulary
    position     the position of that difference
    agreement    top-1 agreement: the fraction of positions at which both models prefer the same token
    frequencies  the largest relative difference of the inverse frequencies, by layer type
    configs      the settings that differ, with both values
    """

    logits: float
    position: int
    agreement: float
    frequencies: dict[str, float]
    configs: dict[str, tuple[Any, Any]]

    def lines(self) -> list[str]:
        """The result as lines of text."""
        lines = [
            f"largest logit difference  {self.logits:.3g} (at position {self.position})",
            f"top-1 agreement           {self.agreement:.2%}",
        ]
        lines += [f"inverse frequencies       {kind} {value:.3g}" for kind, value in self.frequencies.items()]
        if not self.configs:
            lines.append("configs                   equal")
        lines += [f"config {key}: {a!r} / {b!r}" for key, (a, b) in self.configs.items()]
        return lines


def verify(a: str | Path, b: str | Path, *, tokens: int = 256, reference: bool = False) -> Verification:
    """Compare two model directories (or GGUF files) in float32 on `tokens` fixed pseudo-random token ids.

    Both run in mlx-lm, with their configs normalised; with `reference`, `b` runs in transformers on torch.
    Raises UserError if either is damaged or if their vocabularies differ.
    """
    if tokens < 1:
        raise UserError(f"--tokens must be at least 1, not {tokens}")
    with _directory(a) as first, _directory(b) as second:
        ours = check_model_dir(first).config
        theirs = check_config(second, runs_in_mlx_lm=False) if reference else check_model_dir(second).config
        vocab = min(int(ours["vocab_size"]), int(theirs["vocab_size"]))
        ids = np.random.default_rng(SEED).integers(0, vocab, (1, tokens))
        left = mlx_logits(first, ours, ids)
        right = torch_logits(second, ids) if reference else mlx_logits(second, theirs, ids)
    if left.shape != right.shape:
        raise UserError(f"the vocabularies differ: {left.shape[-1]} and {right.shape[-1]} tokens")
    worst = np.abs(left - right).max(axis=-1)[0]
    return Verification(
        float(worst.max()),
        int(worst.argmax()),
        float((left.argmax(-1) == right.argmax(-1)).mean()),
        _frequencies(ours, theirs),
        differences(ours, theirs),
    )


@contextmanager
def _directory(source: str | Path) -> Iterator[Path]:
    """The path of a model directory; for a GGUF file a converted copy, which is removed afterwards."""
    path = Path(source)
    with reading(path):
        is_gguf = path.is_file() and path.suffix == ".gguf"
    if is_gguf:
        with tempfile.TemporaryDirectory() as folder:
            yield from_gguf(path, Path(folder) / "model", dtype="float32")
    else:
        yield resolve(source)


def mlx_logits(directory: Path, config: Mapping[str, Any], ids: np.ndarray) -> np.ndarray:
    """float32 logits (1, T, vocabulary) of stock mlx-lm."""
    from mlx_lm.utils import load_model

    with path_for_mlx_lm(directory) as path:
        model, _ = load_model(path, lazy=True, model_config=dict(config))
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(ids)).astype(mx.float32))


def torch_logits(directory: Path, ids: np.ndarray) -> np.ndarray:
    """float32 logits (1, T, vocabulary) of transformers on torch."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError("--reference needs torch: pip install 'mlx-linearard[hf]'") from None
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    )
    with torch.no_grad():
        logits: np.ndarray = model.eval()(torch.tensor(ids)).logits.numpy()
    return logits


def _frequencies(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, float]:
    """The largest relative difference by layer type; infinite if the heads have different sizes."""
    try:
        left, right = inverse_frequencies(a), inverse_frequencies(b)
    except ValueError:  # dynamic scaling has no fixed frequencies
        return {}
    return {
        kind: float(np.abs(left[kind] / right[kind] - 1).max())
        if left[kind].shape == right[kind].shape
        else float("inf")
        for kind in sorted(left.keys() & right.keys())
    }


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings in which two normalised configs differ."""
    keys = sorted((a.keys() | b.keys()) - set(UNIMPORTANT))
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}
