"""`export`: a finished run in the format that another tool reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..convert.hf import from_hf, to_hf
from ..convert.peft import to_peft
from ..errors import UserError
from ..files import RunDir, check_overwrite, new_directory
from ..models.save import link
from ..report.load import read_run
from .card import bits_of, write_card

FORMATS = ("mlx", "hf", "peft", "adapters")


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
    """Write a finished run in another format.

    Args:
        run_dir: the `--output` of a finished distillation.
        out_dir: the directory to write.
        format: `mlx`: the fused model for mlx-lm. `hf`: the fused model for transformers. `peft`: the adapters for
            PEFT, which loads them on a copy of the base with the scaled config. `adapters`: mlx-lm's adapters with
            the scaled base beside them.
        dtype: float32, float16 or bfloat16 for the fused weights (`mlx`, `hf`); None keeps their dtype.
        quantize: quantize the fused model (`mlx`), with `q_bits` per weight and one scale per `q_group_size` weights.
        overwrite: replace `out_dir`, if this tool wrote it.
        progress: called with one line per finished file.

    Returns:
        The directory that was written.

    Raises:
        UserError: if the run is not finished, or the options do not fit together.
    """
    run = RunDir(run_dir)
    if format not in FORMATS:
        raise UserError(f"--format {format}: must be one of {', '.join(FORMATS)}")
    if run.comparison.exists():
        raise UserError(f"{run.root} is a comparison: name one of its runs, as in --run {run.root / 'logits'}")
    if not all(folder.is_dir() for folder in (run.model, run.adapters, run.base)):
        raise UserError(f"{run.root} is not a finished run: give the --output of a finished distillation")
    if quantize and format != "mlx":
        raise UserError(f"--quantize needs --format mlx, not {format}")
    if dtype and format in ("peft", "adapters"):
        raise UserError(f"--dtype needs --format mlx or hf, not {format}")
    if overwrite:
        check_overwrite(out_dir, [run.root])
    facts = read_run(run.root)
    out = Path(out_dir)
    if format == "mlx":
        from_hf(
            run.model,
            out,
            dtype=dtype,
            quantize=quantize,
            q_bits=q_bits,
            q_group_size=q_group_size,
            overwrite=overwrite,
            progress=progress,
        )
    elif format == "hf":
        to_hf(run.model, out, dtype=dtype, overwrite=overwrite, progress=progress)
    elif format == "peft":
        to_peft(run.adapters, out, base_model=str(run.base), overwrite=overwrite, progress=progress)
    else:
        _with_base(run, out, overwrite)
    write_card(out, facts, format, bits=bits_of(out) if format == "mlx" else 0)
    return out


def _with_base(run: RunDir, out_dir: Path, overwrite: bool) -> Path:
    """Write adapters/ and base/ side by side, for mlx_lm.server --model base --adapter-path adapters."""
    with new_directory(out_dir, overwrite=overwrite, sources=[run.root]) as folder:
        for source in (run.adapters, run.base):
            for file in sorted(path for path in source.rglob("*") if path.is_file()):
                copy = folder / source.name / file.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                link(file, copy)
    return out_dir
