"""LoRA and DoRA adapters between mlx-lm's format and PEFT's.

The same numbers, transposed: PEFT's lora_A (r, in) and lora_B (out, r) are mlx-lm's lora_a (in, r) and
lora_b (r, out), PEFT's lora_magnitude_vector is DoRA's m, and scale = lora_alpha / r.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import UserError
from ..files import ADAPTER_CONFIG, ADAPTERS, new_directory, read_json, write_json
from ..models import directory as safe
from ..models.save import Tensor, write_safetensors

PEFT_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# What wrappers of a training script leave in the names.
WRAPPERS = ("_orig_mod.", "module.")

_OURS = re.compile(r"(?P<path>.+)\.(?P<leaf>lora_a|lora_b|m)")
_THEIRS = re.compile(
    r"base_model\.model\.(?P<path>.+)\.(?P<leaf>lora_A|lora_B|lora_magnitude_vector)(\.default)?(\.weight)?"
)
_LEAVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_BACK = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m"}
_LAYER = re.compile(r"(?P<before>.*layers)\.(?P<number>\d+)\.(?P<module>.+)")
# PEFT settings under which the adapter is not the plain product we can express, and what they do.
_REFUSED = {
    "fan_in_fan_out": "transposes the base's weights",
    "modules_to_save": "replaces whole modules",
    "rank_pattern": "gives modules ranks of their own",
    "alpha_pattern": "gives modules scales of their own",
    "layer_replication": "repeats layers",
    "lora_bias": "adds biases",
    "trainable_token_indices": "trains embeddings",
    "target_parameters": "adapts bare parameters",
    "alora_invocation_tokens": "switches on at a token",
}
# Initialisations that also change the base's weights, so the adapter alone is not the whole change.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq")

Modules = dict[str, dict[str, mx.array]]


def to_peft(
    source: str | Path,
    target: str | Path,
    *,
    base_model: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Convert an mlx-lm adapter directory to a PEFT one; return its path.

    base_model is what PEFT records as the model to load the adapter on: a directory or repository, scaled as
    the adapter was trained. UserError where the adapter is damaged or not LoRA or DoRA.
    """
    source = _directory(source)
    config = _object(source / ADAPTER_CONFIG)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UserError(f"{source} holds {kind!r} weights, not an adapter; fuse the model and use to-hf")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise UserError(f"{source / ADAPTER_CONFIG} has no lora_parameters")
    scale = _number(parameters, "scale", source)
    dropout = _number(parameters, "dropout", source, 0.0)
    modules = _group(_read(source / ADAPTERS), _OURS, {}, source / ADAPTERS)
    rank = _check(modules, kind == "dora", source / ADAPTERS, axis=0)
    peft_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or _recorded_base(config),
        "r": rank,
        "lora_alpha": alpha(scale, rank),
        "lora_dropout": dropout,
        "use_dora": kind == "dora",
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        **_targets(modules, config.get("num_layers")),
    }
    tensors = [
        _tensor(f"{PREFIX}{path}.{_LEAVES[leaf]}", array)
        for path, leaves in modules.items()
        for leaf, array in leaves.items()
    ]
    return _write(target, PEFT_WEIGHTS, tensors, peft_config, "pt", overwrite, progress)


def from_peft(
    source: str | Path,
    target: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Convert a PEFT LoRA or DoRA directory to mlx-lm's adapter format; return its path.

    UserError where PEFT's settings mean more than a scaled product, or the weights are pickled or damaged.
    """
    source = _directory(source)
    config = _object(source / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{source} is a {config.get('peft_type')!r} adapter; only LORA is converted")
    for key, meaning in _REFUSED.items():
        if config.get(key):
            raise UserError(f"{source / ADAPTER_CONFIG}: {key} {meaning}, which mlx-lm's adapters cannot say")
    if config.get("bias", "none") != "none":
        raise UserError(f"{source / ADAPTER_CONFIG}: bias {config['bias']!r} is not converted")
    started = str(config.get("init_lora_weights", ""))
    if started.lower().startswith(_BASE_CHANGING):
        raise UserError(f"{source / ADAPTER_CONFIG}: {started} also changed the base's weights; not converted")
    if not (source / PEFT_WEIGHTS).is_file() and (source / "adapter_model.bin").is_file():
        raise UserError(f"{source} holds only pickled weights, which can run any code: save it as safetensors")
    dora = bool(config.get("use_dora"))
    modules = _group(_read(source / PEFT_WEIGHTS), _THEIRS, _BACK, source / PEFT_WEIGHTS)
    rank = _check(modules, dora, source / PEFT_WEIGHTS, axis=1)
    if config.get("r") != rank:
        raise UserError(f"{source / ADAPTER_CONFIG} says r = {config.get('r')!r}, but the weights have {rank}")
    stated = _number(config, "lora_alpha", source)
    keys, num_layers = _keys(modules, config.get("layers_to_transform"))
    mlx_config = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": rank,
            "scale": stated / (math.sqrt(rank) if config.get("use_rslora") else rank),
            "dropout": _number(config, "lora_dropout", source, 0.0),
            "keys": keys,
        },
    }
    if isinstance(config.get("base_model_name_or_path"), str):
        mlx_config["model"] = config["base_model_name_or_path"]
    tensors = [_tensor(f"{path}.{leaf}", array) for path, leaves in modules.items() for leaf, array in leaves.items()]
    return _write(target, ADAPTERS, tensors, mlx_config, "mlx", overwrite, progress)


def alpha(scale: float, rank: int) -> float | int:
    """The lora_alpha for which lora_alpha / rank is `scale`, to the last bit where any number is."""
    product = scale * rank
    candidates = (product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf))
    value = min(candidates, key=lambda candidate: abs(candidate / rank - scale))
    return int(value) if value == int(value) else value


def _directory(source: str | Path) -> Path:
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"{source} is not an adapter directory")
    return source


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object")
    return value


def _number(config: Mapping[str, Any], key: str, where: Path, default: float | None = None) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where / ADAPTER_CONFIG}: {key} must be a number, not {value!r}")
    return float(value)


def _read(path: Path) -> dict[str, mx.array]:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    return safe.load_lazily(safe.read_header(path)[0])


def _group(arrays: Mapping[str, mx.array], pattern: re.Pattern[str], leaves: Mapping[str, str], where: Path) -> Modules:
    """The arrays by module and mlx-lm leaf, matrices transposed; UserError for names of another kind."""
    modules: dict[str, dict[str, mx.array]] = defaultdict(dict)
    unknown = []
    for name, array in sorted(arrays.items()):
        plain = name
        for wrapper in WRAPPERS:
            plain = plain.replace(wrapper, "")
        match = pattern.fullmatch(plain)
        if match is None or array.ndim != (1 if match["leaf"] in ("m", "lora_magnitude_vector") else 2):
            unknown.append(name)
            continue
        leaf = leaves.get(match["leaf"], match["leaf"])
        modules[match["path"]][leaf] = array.T if array.ndim == 2 else array
    safe.refuse([f"unexpected {name} {tuple(arrays[name].shape)}" for name in unknown], str(where))
    if not modules:
        raise UserError(f"{where} holds no adapter")
    return dict(modules)


def _check(modules: Modules, dora: bool, where: Path, axis: int) -> int:
    """The one rank of all modules, along `axis` of lora_a; UserError listing those that do not fit."""
    wanted = {"lora_a", "lora_b", "m"} if dora else {"lora_a", "lora_b"}
    wrong = [f"{path} has {', '.join(sorted(m))}" for path, m in modules.items() if set(m) != wanted]
    safe.refuse(wrong, f"{where} should hold {', '.join(sorted(wanted))} of each module")
    shapes = {path: (leaves["lora_a"].shape, leaves["lora_b"].shape) for path, leaves in modules.items()}
    wrong = [f"{path} {a} {b}" for path, (a, b) in shapes.items() if a[axis] != b[1 - axis]]
    safe.refuse(wrong, f"{where}: factors that do not fit each other")
    ranks = {a[axis] for a, _ in shapes.values()}
    if len(ranks) != 1:
        raise UserError(f"{where}: its modules have ranks {sorted(ranks)}, but mlx-lm's adapters have one")
    return int(ranks.pop())


def _targets(modules: Modules, num_layers: Any) -> dict[str, Any]:
    """PEFT's target_modules and layers_to_transform that mean exactly these modules."""
    by_layer = _by_layer(modules)
    if by_layer is None or len({frozenset(names) for names in by_layer.values()}) != 1:
        return {"target_modules": sorted(modules)}  # whole names: they match themselves only
    layers = sorted(by_layer)
    names = sorted(next(iter(by_layer.values())))
    every = layers == list(range(len(layers))) and num_layers == len(layers)
    return {"target_modules": names, "layers_to_transform": None if every else layers}


def _keys(modules: Modules, layers: Any) -> tuple[list[str], int]:
    """mlx-lm's keys and num_layers that mean exactly these modules.

    Keys inside a layer count from the last layer back, so they are used only where every layer is adapted.
    """
    by_layer = _by_layer(modules)
    if by_layer is None:
        return sorted(modules), len(modules)
    numbers = sorted(by_layer)
    same = len({frozenset(names) for names in by_layer.values()}) == 1
    if layers is None and same and numbers == list(range(len(numbers))):
        return sorted(by_layer[0]), len(numbers)
    return sorted(modules), len(numbers)


def _by_layer(modules: Modules) -> dict[int, set[str]] | None:
    """The adapted modules of each layer; None where some module lies outside the layers."""
    layers: dict[int, set[str]] = defaultdict(set)
    for path in modules:
        match = _LAYER.fullmatch(path)
        if match is None:
            return None
        layers[int(match["number"])].add(match["module"])
    return dict(layers)


def _recorded_base(config: Mapping[str, Any]) -> str | None:
    return config["model"] if isinstance(config.get("model"), str) else None


def _tensor(name: str, array: mx.array) -> Tensor:
    return Tensor(name, tuple(array.shape), array.dtype, lambda: mx.contiguous(array))


def _write(
    target: str | Path,
    weights: str,
    tensors: list[Tensor],
    config: Mapping[str, Any],
    framework: str,
    overwrite: bool,
    progress: Callable[[str], None] | None,
) -> Path:
    with new_directory(target, overwrite=overwrite) as made:
        write_safetensors(made / weights, tensors, {"format": framework})
        write_json(made / ADAPTER_CONFIG, config)
    if progress:
        progress(f"wrote {len(tensors)} tensors to {target}")
    return Path(target)
