"""What a run leaves behind: the scaled base, the adapters, and the fused model that any mlx-lm tool opens.

`export` carries a finished run on to the format that somebody else's tool wants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..convert.hf import from_hf, to_hf
from ..convert.peft import to_peft
from ..errors import UserError
from ..files import RunDir, new_directory
from ..models.adapters import MasterLinear
from ..models.pair import Pair
from ..models.save import (
    Tensor,
    lazy,
    link,
)
from ..models.trees import named_arrays

FORMATS = ("mlx", "hf", "peft", "adapters")


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


# ---------------------------------------------------------------------------------------------------
# Verification: what stock mlx-lm loads is what was trained.


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
