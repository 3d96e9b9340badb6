"""`export`: a finished run in the format that another tool reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..convert.gguf_write import to_gguf
from ..convert.hf import from_hf, to_hf
from ..convert.peft import to_peft
from ..errors import UserError
from ..files import CARD, RunDir, check_overwrite, is_as_added, new_directory, read_config, remember, remembered
from ..models.quantization import Scheme
from ..models.save import link
from ..models.weights import weight_files
from ..report.card import base_name, bits_of, origin_of_run, write_card
from ..report.load import RunFacts, read_run
from ..rope import native_window
from .learned import texts_of, train_scales
from .quantized import ADVICE, float_type, measure_cost, scheme_for, sizes, smaller
from .upload import check_upload, token_of_hub, upload

_FROM, _CARD = "from", "card"  # what an export notes: what it was made from, and what its card says beside the run
FORMATS = ("mlx", "hf", "peft", "adapters", "gguf")


def export(
    run_dir: str | Path,
    out_dir: str | Path,
    *,
    format: str = "mlx",
    dtype: str | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    learn: int = 0,
    measure: bool = True,
    overwrite: bool = False,
    upload_repo: str | None = None,
    public: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write a finished run in another format.

    Args:
        run_dir: the `--output` of a finished distillation.
        out_dir: the directory to write.
        format: `mlx`: the fused model for mlx-lm. `hf`: the fused model for transformers. `peft`: the adapters for
            PEFT, which loads them on a copy of the base with the scaled config. `adapters`: mlx-lm's adapters with
            the scaled base beside them. `gguf`: the fused model for llama.cpp, Ollama and LM Studio.
        dtype: float32, float16 or bfloat16 for the fused weights (`mlx`, `hf`, `gguf`); None keeps their dtype.
        quantize: quantize the fused model (`mlx`, `gguf`), with `q_bits` per weight and one scale per `q_group_size`
            weights. Without `q_bits`, 4 bits; `gguf`, which has 8 bits only, takes no group size.
            For a quantized base, the base's own bits and group size are the default of `mlx`.
        learn: train the scales of the quantized model (`mlx`) on this many texts of the run's training data, by
            mlx-lm's learned quantization; 0 for none.
        measure: measure what quantizing cost (`mlx`), and add it to the run's results and to the card.
        overwrite: replace `out_dir`, if this tool wrote it.
        upload_repo: a repository of the hub, OWNER/NAME, to which the export is uploaded. It is made private unless
            `public`. An export that stands in `out_dir` already is uploaded as it is, which continues an upload; only
            its card gets the results of today, unless it was changed by hand.
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
    if quantize and format not in ("mlx", "gguf"):
        raise UserError(f"--quantize needs --format mlx or gguf, not {format}")
    if quantize and format == "gguf" and q_bits not in (None, 8):
        raise UserError(
            f"--q-bits {q_bits}: GGUF is written with 8 bits (q8_0); llama.cpp's llama-quantize makes smaller files"
        )
    if learn and not (quantize and format == "mlx"):
        raise UserError("--learn trains a quantized model: it needs -q and --format mlx")
    if dtype and format in ("peft", "adapters"):
        raise UserError(f"--dtype needs --format mlx, hf or gguf, not {format}")
    if overwrite:
        check_overwrite(out_dir, [run.root])
    facts, file, out = read_run(run.root), "", Path(out_dir)
    made = _made(run, format, dtype, quantize, q_bits, q_group_size, learn)
    if upload_repo is not None:
        check_upload(upload_repo, token_of_hub())
        if not overwrite and _is_made(out, made):
            if progress:
                progress(f"{out} is exported already and is uploaded as it is (--overwrite exports again)")
            if is_as_added(out, CARD):
                _write_card(out, facts, format, upload_repo, **remembered(out)[_CARD])
            upload(out, upload_repo, public=public, progress=progress)
            return out
    weights: list[str] = []
    if format == "mlx" and quantize:
        scheme = scheme_for(run, q_bits, q_group_size)
        weights = _quantized(run, out, facts, scheme, dtype, learn, measure, overwrite, progress)
        facts = read_run(run.root)
    elif format == "mlx":
        if progress and "quantization" in read_config(run.base):
            progress(f"q, k and v stay unquantized, so this is larger than the base: {smaller(run)}")
        from_hf(run.model, out, dtype=dtype, overwrite=overwrite, progress=progress)
    elif format == "hf":
        to_hf(run.model, out, dtype=dtype, overwrite=overwrite, progress=progress)
    elif format == "peft":
        to_peft(run.adapters, out, base_model=str(run.base), overwrite=overwrite, progress=progress)
    elif format == "adapters":
        _with_base(run, out, overwrite)
    else:
        file = _gguf(run, out, facts, "q8_0" if quantize else dtype, overwrite, progress)
    _write_card(out, facts, format, upload_repo, file, weights)
    remember(out, {_FROM: made, _CARD: {"file": file, "weights": weights}})
    if upload_repo is not None:
        upload(out, upload_repo, public=public, progress=progress)
    return out


def _quantized(
    run: RunDir,
    out: Path,
    facts: RunFacts,
    scheme: Scheme,
    dtype: str | None,
    learned: int,
    measured: bool,
    overwrite: bool,
    progress: Callable[[str], None] | None,
) -> list[str]:
    """Say the sizes, write the quantized model, and measure what that cost; returns sentences for the card."""
    say = progress or (lambda _: None)
    dtype = dtype or float_type(run)
    size = sizes(run, scheme, dtype).line(scheme)
    say(size)
    texts = texts_of(run, facts, learned) if learned else []
    from_hf(
        run.model,
        out,
        dtype=dtype,
        quantize=True,
        q_bits=scheme.bits,
        q_group_size=scheme.group_size,
        overwrite=overwrite,
        progress=progress,
    )
    done = [f"Quantized: {size}."]
    if learned:
        say(f"training the scales on {learned} texts, by mlx-lm's learned quantization")
        train_scales(run, out, texts)
        done.append(f"Its scales were trained on {learned} texts by mlx-lm's learned quantization (DWQ).")
    cost = measure_cost(run, out, facts, scheme, say, learned=bool(learned)) if measured else None
    if cost is None:
        return [*done, "What that cost was not measured."]
    say(cost.sentence())
    if cost.much and not learned:
        say(ADVICE)
    return [*done, cost.sentence()]


def _write_card(
    out: Path, facts: RunFacts, format: str, upload_repo: str | None, file: str, weights: Sequence[str]
) -> None:
    bits = bits_of(out) if format == "mlx" else 0
    write_card(out, facts, format, name=upload_repo or "", bits=bits, file=file, weights=weights)


def _is_made(out: Path, made: Mapping[str, Any]) -> bool:
    """Whether `out` holds this export, as `export` noted it."""
    noted = remembered(out)
    return isinstance(noted, dict) and noted.get(_FROM) == made and noted.keys() == {_FROM, _CARD}


def _made(run: RunDir, *options: Any) -> dict[str, Any]:
    """What an export is made from: the same model of the same run, with the same options, gives the same export."""
    weights = [path.stat() for path in weight_files(run.model)]
    return {
        "run": str(run.root.resolve()),
        "weights": [[stat.st_size, stat.st_mtime_ns] for stat in weights],
        "options": list(options),
    }


def _gguf(
    run: RunDir,
    out_dir: Path,
    facts: RunFacts,
    dtype: str | None,
    overwrite: bool,
    progress: Callable[[str], None] | None,
) -> str:
    """Write the GGUF file and Ollama's Modelfile; returns the file's name."""
    window = native_window(read_config(run.model))
    base = re.sub(r"[^A-Za-z0-9]+", "-", base_name(facts, origin_of_run(facts)).rpartition("/")[2]).strip("-")
    file = f"{base or 'model'}-{window}.gguf"
    with new_directory(out_dir, overwrite=overwrite, sources=[run.root]) as folder:
        to_gguf(run.model, folder / file, dtype=dtype)
        (folder / "Modelfile").write_text(f"FROM ./{file}\nPARAMETER num_ctx {window}\n", encoding="utf-8")
        if progress:
            progress(f"wrote {file} ({(folder / file).stat().st_size / 1e6:.0f} MB)")
    return file


def _with_base(run: RunDir, out_dir: Path, overwrite: bool) -> Path:
    """Write adapters/ and base/ side by side, for mlx_lm.server --model base --adapter-path adapters."""
    with new_directory(out_dir, overwrite=overwrite, sources=[run.root]) as folder:
        for source in (run.adapters, run.base):
            for file in sorted(path for path in source.rglob("*") if path.is_file()):
                copy = folder / source.name / file.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                link(file, copy)
    return out_dir
