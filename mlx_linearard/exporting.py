"""What a run leaves behind: the scaled base, the adapters, and the fused model that any mlx-lm tool opens.

`export` carries a finished run on to the format that somebody else's tool wants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_model

from .convert.hf import from_hf, link, link_model_files, to_hf
from .convert.peft import to_peft
from .convert.write import Tensor, copy_tokenizer, lazy, model_directory, write_config, write_safetensors
from .errors import UserError
from .files import ADAPTER_CONFIG, ADAPTERS, RunDir, new_directory, write_json
from .pair import MasterLinear, Pair, layer_paths
from .trees import named_arrays

# Mean KL between the student in memory and the export as stock mlx-lm loads it, in nats a token. Fusing
# rounds W + scale B A once more, in the dtype of the export; beyond these bounds something else is wrong.
TOLERANCE = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 5e-2}

FORMATS = ("mlx", "hf", "peft", "adapters")


def write_base(pair: Pair, target: Path) -> None:
    """The base model with the scaled config: weights linked, not copied, so that adapters find their RoPE."""
    with new_directory(target, overwrite=True) as made:
        link_model_files(pair.path, made)
        write_config(made, pair.scaled_config)


def write_adapters(pair: Pair, target: Path, note: dict[str, Any]) -> None:
    """mlx-lm's adapter directory; `note` is kept in adapter_config.json beside what mlx-lm reads."""
    paths = layer_paths(pair.student)
    with new_directory(target, overwrite=True) as made:
        write_safetensors(made / ADAPTERS, _adapter_tensors(pair, paths))
        write_json(made / ADAPTER_CONFIG, {**pair.adapter.config(paths), **note})


def _adapter_tensors(pair: Pair, paths: list[str]) -> Iterator[Tensor]:
    """The trained arrays by their full names; float32 masters in the dtype of the weights they replace."""
    for index in pair.adapter.layers:
        layer = pair.student.layers[index]
        for name, array in named_arrays(layer.trainable_parameters()):
            module = dict(layer.named_modules())[name.rpartition(".")[0]]
            yield lazy(
                f"{paths[index]}.{name}",
                array.astype(module.source_dtype) if isinstance(module, MasterLinear) else array,
            )


def write_fused(pair: Pair, target: Path) -> None:
    """The restored model: adapters folded into q, k, v, all other weights as they are.

    Projections of a quantized base are written unquantized where they were adapted: quantizing them again
    would throw away most of what was learnt. mlx-lm loads such a mixture as it stands.
    """
    fused = {name: _fuse(module) for name, module in pair.student.named_modules() if _is_adapted(module)}
    config = dict(pair.scaled_config)
    for key in ("quantization", "quantization_config"):
        if isinstance(config.get(key), dict):
            config[key] = {name: value for name, value in config[key].items() if name not in fused}
    with model_directory(target, config, _fused_tensors(pair, fused), overwrite=True) as made:
        copy_tokenizer(pair.path, made)


def _is_adapted(module: Any) -> bool:
    return hasattr(module, "fuse") or isinstance(module, MasterLinear)


def _fuse(module: Any) -> nn.Module:
    """One projection with its adapter folded in, unquantized and lazy."""
    return module.as_linear() if isinstance(module, MasterLinear) else module.fuse(dequantize=True)


def _fused_tensors(pair: Pair, fused: dict[str, nn.Module]) -> Iterator[Tensor]:
    for name, array in named_arrays(pair.student.parameters()):
        if not any(name.startswith(f"{prefix}.") for prefix in fused):
            yield lazy(name, array)
    for prefix, module in fused.items():
        for name, array in named_arrays(module.parameters()):
            yield lazy(f"{prefix}.{name}", array)


# ---------------------------------------------------------------------------------------------------
# Verification: what stock mlx-lm loads is what was trained.


@dataclass(frozen=True)
class Verified:
    """How far the loaded export is from the student in memory, on one sample."""

    max_difference: float  # of logits
    kl: float  # nats a token
    tokens: int
    tolerance: float  # of the KL

    @property
    def ok(self) -> bool:
        return self.kl <= self.tolerance


def sample_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """A model's logits on one sample by its own stock code, (T, V) float32."""
    model.eval()
    return np.array(model(mx.array(tokens)[None])[0].astype(mx.float32))


def verify_export(directory: Path, tokens: np.ndarray, expected: np.ndarray) -> Verified:
    """Load `directory` with stock mlx-lm and compare its logits on `tokens` with the student's."""
    model, _ = load_model(directory)
    found = sample_logits(model, tokens)
    floats = [a.dtype for _, a in named_arrays(model.parameters()) if a.dtype in TOLERANCE]
    tolerance = max((TOLERANCE[dtype] for dtype in floats), default=TOLERANCE[mx.bfloat16])
    return Verified(float(np.abs(found - expected).max()), _mean_kl(expected, found), len(tokens), tolerance)


def _mean_kl(a: np.ndarray, b: np.ndarray) -> float:
    """KL(softmax a || softmax b), averaged over rows, in float64."""
    log_a, log_b = _log_softmax(a), _log_softmax(b)
    return float((np.exp(log_a) * (log_a - log_b)).sum(-1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# ---------------------------------------------------------------------------------------------------
# A finished run for other tools


def export(
    run_dir: str | Path,
    out_dir: str | Path,
    *,
    format: str = "mlx",
    dtype: str | None = None,
    quantize: bool = False,
    q_bits: int = 4,
    q_group_size: int = 64,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write a finished run in another form; returns the directory written.

    Args:
        format: `mlx`, the fused model for mlx-lm (optionally in another dtype, or quantized); `hf`, the fused
            model for transformers; `peft`, the adapters for PEFT, to be loaded on a copy of the base with the
            scaled config; `adapters`, mlx-lm's adapters with the scaled base beside them.
    Raises:
        UserError: where the run is not finished or the options do not go together.
    """
    run = RunDir(run_dir)
    if run.comparison.exists():
        raise UserError(f"{run.root} holds a comparison: give one of its runs, as in --run {run.root / 'logits'}")
    if not all(folder.is_dir() for folder in (run.model, run.adapters, run.base)):
        raise UserError(f"{run.root} holds no finished run: give the --output of a distillation that has ended")
    if quantize and format != "mlx":
        raise UserError(f"--quantize goes with --format mlx, not {format}")
    if dtype and format in ("peft", "adapters"):
        raise UserError(f"--dtype goes with --format mlx or hf, not {format}")
    if format == "mlx":
        return from_hf(
            run.model, out_dir, dtype=dtype, quantize=quantize, q_bits=q_bits, q_group_size=q_group_size,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
    if format == "hf":
        return to_hf(run.model, out_dir, dtype=dtype, overwrite=overwrite, progress=progress)
    if format == "peft":
        return to_peft(run.adapters, out_dir, base_model=str(run.base), overwrite=overwrite, progress=progress)
    if format == "adapters":
        return _with_base(run, Path(out_dir), overwrite)
    raise UserError(f"--format {format}: must be one of {', '.join(FORMATS)}")


def _with_base(run: RunDir, out_dir: Path, overwrite: bool) -> Path:
    """adapters/ and base/ side by side: what mlx_lm.server --model base --adapter-path adapters takes."""
    with new_directory(out_dir, overwrite=overwrite) as made:
        for source in (run.adapters, run.base):
            (made / source.name).mkdir()
            for file in _files(source):
                link(file, made / source.name / file.name)
    return out_dir


def _files(folder: Path) -> Iterable[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file())
