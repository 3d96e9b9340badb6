"""What quantizing a restored model cost, measured on the run's own held-out text.

Three comparisons: the quantized model with the restored one, with the native one, and the native model quantized alike
with the native one. The last tells how much of the cost is that of quantizing any such model.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..convert.hf import quantized_bytes
from ..errors import UserError
from ..evaluate.held_out import Fidelity, measure
from ..files import RunDir, read_config
from ..models.directory import check_model_dir, load
from ..models.dtypes import FLOAT_NAMES
from ..models.pair import load_frozen
from ..models.quantization import Scheme
from ..models.tokenizer import tokenizer_of
from ..report.card import update_card
from ..report.load import RunFacts
from ..report.render import write_report
from ..results.records import read_pieces, read_windows, write_pieces
from ..results.rows import NATIVE, RESTORED, Results, Row
from ..results.store import update_results
from ..rope import native_window

WORKSPACE = 256 << 20  # bytes for tiles of logits
ADVICE = "the same command with --learn 160 --overwrite trains the scales, which loses less; so do more --q-bits"
MUCH = 0.5  # quantizing that adds more than this part of the restored model's KL is worth a better method
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """Bytes of the weights: of the base model, of the restored model, and of the quantized one."""

    base: int
    restored: int
    quantized: int

    def line(self, scheme: Scheme) -> str:
        return (
            f"{scheme.bits} bits in groups of {scheme.group_size}: {_megabytes(self.quantized)} of weights instead of "
            f"{_megabytes(self.restored)} (the base model has {_megabytes(self.base)})"
        )


@dataclass(frozen=True)
class Cost:
    """What quantizing cost, in nats per token on held-out text. native_alike: None if the base was quantized already.

    to_restored, to_native: KL from each to the quantized model. restored: KL from native to restored. native_alike: KL
    from native to native quantized alike.
    """

    to_restored: float
    to_native: float
    restored: float | None
    native_alike: float | None

    @property
    def much(self) -> bool:
        """Whether quantizing undid much of what training restored."""
        return self.restored is not None and self.to_native > (1 + MUCH) * self.restored

    def sentence(self) -> str:
        """The cost in words."""
        text = f"Quantizing cost {self.to_restored:.4f} nats per token of KL to the restored model."
        if self.restored is not None:
            text += f" The KL to the native model is {self.to_native:.4f}; it was {self.restored:.4f} unquantized."
        if self.native_alike is not None:
            return f"{text} The native model quantized alike has {self.native_alike:.4f}."
        return f"{text} The native model of this run is quantized itself."


def scheme_for(run: RunDir, bits: int | None, group_size: int | None) -> Scheme:
    """The scheme that is asked for; what is left open is that of a quantized base, else 4 bits in groups of 64."""
    base = read_config(run.base).get("quantization")
    affine = base if isinstance(base, Mapping) and base.get("mode", "affine") == "affine" else {}
    return Scheme(group_size or affine.get("group_size") or 64, bits or affine.get("bits") or 4)


def float_type(run: RunDir) -> str | None:
    """The floating dtype of a quantized base's files, so that the export has their size; None for another base."""
    if "quantization" not in read_config(run.base):
        return None
    kinds = Counter(FLOAT_NAMES[a.dtype] for a in check_model_dir(run.base).arrays.values() if a.dtype in FLOAT_NAMES)
    return kinds.most_common(1)[0][0] if kinds else None


def sizes(run: RunDir, scheme: Scheme, dtype: str | None) -> Sizes:
    """The sizes before anything is written; `dtype` of what stays floating, None for that of the restored model."""
    base = sum(array.nbytes for array in check_model_dir(run.base).arrays.values())
    return Sizes(base, *quantized_bytes(run.model, scheme.bits, scheme.group_size, dtype))


def smaller(run: RunDir) -> str:
    """How a run on a quantized base gives a model of the base's size."""
    return (
        f"with -q it has {sizes(run, scheme_for(run, None, None), float_type(run)).line(scheme_for(run, None, None))}"
    )


def measure_cost(
    run: RunDir, folder: Path, facts: RunFacts, scheme: Scheme, progress: Progress, *, learned: bool = False
) -> Cost | None:
    """Measure the quantized model in `folder`, and add it to the run's results and report.

    Returns None, after saying why, if the run kept no held-out text or its base model is gone.
    """
    windows = read_windows(run.held_out_tokens)
    base = facts.config.get("model")
    if not windows or not isinstance(base, str) or not Path(base).is_dir():
        missing = "the run kept no held-out text" if not windows else f"its base model is no longer at {base}"
        progress(f"what quantizing cost is not measured: {missing}")
        return None
    progress("measuring what quantizing cost")
    name = f"{scheme.bits}bit" + ("" if scheme.group_size == 64 else f"-g{scheme.group_size}")
    native, native_config = _load(Path(base))
    side = _Side(native, native_config, tokenizer_of(Path(base), native_config), windows)
    quantized, _ = _load(folder)
    own_label = f"{RESTORED}-{name}" + ("-learned" if learned else "")
    found = {own_label: side.compare(quantized)}
    alike = _quantized_alike(Path(base), check_model_dir(folder).quantized)
    if alike is not None:
        found[f"{NATIVE}-{name}"] = side.compare(alike)
    del alike, native
    restored, _ = _load(run.model)
    to_restored = dataclasses.replace(side, teacher=restored).compare(quantized, only_reference=True).kl
    rows = {label: fidelity.row for label, fidelity in found.items()}
    own = rows[own_label]
    other = {"kl_to_restored": to_restored, "quantization": scheme.settings()}
    rows[own_label] = dataclasses.replace(own, other=other)
    if own.kl is None or to_restored is None:
        raise UserError(f"{run.held_out_tokens} has no window within the native one, so nothing can be compared")
    _keep(run, rows, found)
    native_alike = rows.get(f"{NATIVE}-{name}", Row()).kl
    return Cost(to_restored, own.kl, facts.row(RESTORED).kl, native_alike)


@dataclass(frozen=True)
class _Side:
    """The model that others are compared with, and the text."""

    teacher: Any
    config: dict[str, Any]
    tokenizer: Any
    windows: Mapping[int, np.ndarray]

    def compare(self, student: Any, *, only_reference: bool = False) -> Fidelity:
        """The student's row: its perplexity at every length, its KL and agreement within the native window."""
        pair: Any = SimpleNamespace(
            teacher=self.teacher,
            student=student,
            tokenizer=self.tokenizer,
            native_config=self.config,
            native_window=native_window(self.config),
        )
        fitting = [length for length in self.windows if length <= pair.native_window]
        chosen = {length: self.windows[length] for length in fitting[-1:]} if only_reference else self.windows
        return measure(pair, chosen, native=False, workspace_bytes=WORKSPACE)[1]


def _load(folder: Path) -> tuple[Any, dict[str, Any]]:
    config = check_model_dir(folder).config
    return load_frozen(folder, config), config


def _quantized_alike(base: Path, schemes: Mapping[str, Scheme]) -> Any | None:
    """The native model with the same layers quantized in the same way; None if they all were quantized already."""
    checked = check_model_dir(base)
    new = {path: scheme for path, scheme in schemes.items() if path not in checked.quantized}
    if checked.quantized or not new:
        return None
    model: Any = load(base, checked.config)
    nn.quantize(model, class_predicate=lambda path, _: new[path].settings() if path in new else False)
    model.freeze()
    mx.eval(model.parameters())
    return model


def _keep(run: RunDir, rows: Mapping[str, Row], found: Mapping[str, Fidelity]) -> None:
    """Add the rows to results.json and their pieces to held_out.json; write the report and the card again."""

    def added(results: Results) -> Results:
        return dataclasses.replace(results, rows={**results.rows, **rows})

    update_results(run.results, added)
    pieces = {label: fidelity.pieces for label, fidelity in found.items()}
    write_pieces(run.held_out, {**read_pieces(run.held_out), **pieces})
    write_report(run.root)
    update_card(run.root)


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
