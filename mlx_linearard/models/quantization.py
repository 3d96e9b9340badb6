"""How mlx quantized each layer of a model directory: read from the config and the weights, by mlx-lm's own rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import UserError, one_line

# mx.quantize's modes -> the allowed bits and group sizes; the defaults of a layer's settings come first
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
_KEYS = {"group_size", "bits", "mode"}
_DORA_BITS = (2, 4, 8)  # mlx-lm's DoRALinear takes a packed row for 32 // bits values per word


@dataclass(frozen=True)
class Scheme:
    """How one layer is quantized: `group_size` weights share a scale, each weight has `bits`, `mode` is mlx's."""

    group_size: int
    bits: int
    mode: str = "affine"

    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `mx.quantize`, which are the entries of a config."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Quantization:
    """A config's quantization: of all layers, and of single layers by path (false: not quantized)."""

    default: Scheme
    layers: Mapping[str, Scheme | bool]

    def of(self, path: str, module: nn.Module, arrays: Mapping[str, mx.array], where: Path) -> Scheme | None:
        """How the layer at `path` is quantized, None if it is not.

        `module` is the layer before it is quantized. A layer that the config does not name is quantized if the
        weights hold scales for it; the shapes then give its bits and group size.
        """
        own = self.layers.get(path)
        if isinstance(own, Scheme) or own is False:
            return own or None
        if own is True:
            return self.default
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in arrays:
            return None
        from mlx_lm.utils import infer_quant_config

        return scheme_of(infer_quant_config(path, module, dict(arrays)), f"{where}: {path}")


def scheme_of(settings: Mapping[str, Any], subject: str, default: str = "affine") -> Scheme:
    """Settings as a Scheme; UserError that begins with `subject` if mlx has no such quantization."""
    mode = settings.get("mode", default)
    bits, groups = MODES.get(mode, ((), ())) if isinstance(mode, str) else ((), ())
    unknown = sorted(settings.keys() - _KEYS)
    if unknown:
        raise UserError(f"{subject}: quantization with {', '.join(map(str, unknown))} is not read")
    if not bits:
        raise UserError(f"{subject}: quantization of mode {mode!r} is not read; only {', '.join(MODES)} are")
    scheme = Scheme(settings.get("group_size", groups[0]), settings.get("bits", bits[0]), mode)
    if not _one_of(scheme.bits, bits) or not _one_of(scheme.group_size, groups):
        size = f"{scheme.bits!r} bits, groups of {scheme.group_size!r}, mode {mode!r}"
        known = f"mode {mode!r} has {_listed(bits)} bits and groups of {_listed(groups)}"
        raise UserError(f"{subject}: quantization of {size[:200]} is not read: {known}")
    return scheme


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers[:-1])) + (" or " if numbers[1:] else "") + str(numbers[-1])


def _one_of(value: Any, allowed: tuple[int, ...]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in allowed


def quantization_of(config: Mapping[str, Any], where: Path) -> Quantization | None:
    """The quantization by mlx that a config states; None if it states none; UserError if it is not supported."""
    settings = config.get("quantization")
    if settings is None:
        method = config.get("quantization_config")
        if isinstance(method, Mapping) and "quant_method" in method:
            raise UserError(f"{where} is quantized by {method['quant_method']!r}; convert an unquantized copy")
        settings = method
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise UserError(f"{where}: quantization must be a JSON object")
    if config.get("quantize_activations"):
        raise UserError(f"{where}: quantize_activations is not read; convert an unquantized copy")
    if not {"group_size", "bits"} <= settings.keys():  # mlx-lm's loader needs both
        raise UserError(f"{where}: quantization needs bits and group_size")
    layers = {
        path: own if isinstance(own, bool) else scheme_of(own, f"{where}: {path}")
        for path, own in settings.items()
        if isinstance(own, bool | Mapping) and path not in _KEYS
    }
    default = {key: value for key, value in settings.items() if key not in layers}
    return Quantization(scheme_of(default, str(where)), layers)


def quantize_structure(
    model: nn.Module, config: Mapping[str, Any], arrays: Mapping[str, mx.array], where: Path
) -> dict[str, Scheme]:
    """Quantize the layers of `model` as its config and weights say; each one's scheme by its path.

    Nothing is evaluated. UserError if the quantization is not read or does not fit the model.
    """
    quantization = quantization_of(config, where)
    schemes: dict[str, Scheme] = {}
    if quantization is None:
        return schemes

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        scheme = quantization.of(path, module, arrays, where)
        if scheme is None:
            return False
        schemes[path] = scheme
        return scheme.settings()

    try:
        nn.quantize(model, class_predicate=predicate)
    except UserError:
        raise
    except Exception as error:  # a width that is not a multiple of the group, scales of an impossible shape
        raise UserError(f"{where}: its quantization does not fit the model ({one_line(error)})") from None
    wrong = [
        path
        for path, scheme in sorted(schemes.items())
        if (scales := arrays.get(f"{path}.scales")) is not None
        and (scales.dtype == mx.uint8) != (scheme.mode != "affine")
    ]
    if wrong:
        path = wrong[0]
        raise UserError(
            f"{where}: {path}.scales are {arrays[f'{path}.scales'].dtype}, not of mode {schemes[path].mode}"
        )
    return schemes


def dequantize(path: str, arrays: Mapping[str, mx.array], scheme: Scheme, dtype: mx.Dtype | None) -> mx.array:
    """The weight (out, in) of a quantized layer, not yet evaluated, in `dtype` or in the type of its scales.

    It is computed in float32 and rounded once. The modes without float scales give bfloat16, which holds each of their
    values exactly.
    """
    weight, scales, biases = arrays[f"{path}.weight"], arrays[f"{path}.scales"], arrays.get(f"{path}.biases")
    if biases is not None:  # affine
        dtype = dtype or scales.dtype
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    result = mx.dequantize(weight, scales, biases, **scheme.settings())
    return result if dtype is None else result.astype(dtype)


def check_trainable(fine_tune_type: str, schemes: Mapping[str, Scheme], keys: Iterable[str]) -> None:
    """UserError if a projection cannot be trained because of its quantization.

    `keys` are the projections' paths inside a layer. Full training needs float weights. mlx-lm's DoRA miscounts the
    width of a row whose bits do not divide 32, in training and in every later load of the adapter.
    """
    endings = tuple(f".{key}" for key in keys)
    for path, scheme in sorted(schemes.items()):
        if not path.endswith(endings):
            continue
        if fine_tune_type == "full":
            raise UserError(
                f"--fine-tune-type full cannot train {path}, which is quantized: use lora or dora, or an unquantized "
                "model"
            )
        if fine_tune_type == "dora" and scheme.bits not in _DORA_BITS:
            raise UserError(
                f"--fine-tune-type dora cannot adapt {path} of {scheme.bits} bits: mlx-lm's DoRA needs 2, 4 or 8 bits; "
                "use lora"
            )
