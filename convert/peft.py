"""Converts LoRA and DoRA adapters between mlx-lm's format and PEFT's.

Both hold the same numbers, transposed: PEFT's lora_A (r, in) and lora_B (out, r) are mlx-lm's lora_a (in, r) and
lora_b (r, out). An embedding's are named lora_embedding_A (r, vocabulary) and lora_embedding_B (hidden, r), without
`.weight`. PEFT's lora_magnitude_vector is DoRA's m, and scale = lora_alpha / r.
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
from ..files import ADAPTER_CONFIG, ADAPTERS, CONFIG, new_directory, read_config, read_object, reading, write_json
from ..models.save import Tensor, write_safetensors
from ..models.weights import load_lazily, read_header, refuse

PEFT_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Parts that the wrappers of training scripts add to parameter names.
WRAPPERS = ("_orig_mod.", "module.")

_OURS = re.compile(r"(?P<path>.+)\.(?P<leaf>lora_a|lora_b|m)")
_THEIRS = re.compile(
    r"base_model\.model\.(?P<path>.+)\.(?P<leaf>lora_(embedding_)?[AB]|lora_magnitude_vector)(\.default)?(\.weight)?"
)
_LEAVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_EMBEDDING_LEAVES = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}
_BACK = {
    "lora_A": "lora_a",
    "lora_B": "lora_b",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector": "m",
}
# The last part of the names of modules that look up token embeddings.
_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|tok_embeddings|word_embeddings|embeddings?|embed_in|wte)")
_LAYER = re.compile(r"(?P<before>.*layers)\.(?P<number>\d+)\.(?P<module>.+)")
# PEFT settings with which the adapter is more than a scaled product, and their effect.
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
    "ensure_weight_tying": "ties adapters to each other",
    "use_qalora": "pools the input",
    "use_bdlora": "makes the factors block-diagonal",
    "arrow_config": "routes between adapters",
    "kasa_config": "changes the base's weights",
    "monteclora_config": "draws weights at random",
}
# Initialisations that also change the base's weights, so the adapter alone is not the complete change.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")

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

    base_model is the model that PEFT records, on which it loads the adapter: a directory or a repository, with the
    RoPE scaling of the training. A directory is recorded by its absolute path.
    Raises UserError if the adapter is damaged, is not LoRA or DoRA, or would compute something different in PEFT.
    """
    source = _directory(source)
    config = read_object(source / ADAPTER_CONFIG)
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
    base = _recorded(base_model or config.get("model"))
    _check_embeddings(modules, kind == "dora", base, source / ADAPTERS, "name the base's directory with --base-model")
    peft_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
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
        _tensor(f"{PREFIX}{path}.{(_EMBEDDING_LEAVES if _EMBEDDING.fullmatch(path) else _LEAVES)[leaf]}", array)
        for path, leaves in modules.items()
        for leaf, array in leaves.items()
    ]
    _write(target, PEFT_WEIGHTS, tensors, peft_config, "pt", overwrite, source, progress)
    if progress and "quantization" in (_base_config(base) or {}):
        progress(
            f"{base} is quantized by mlx, so transformers cannot load it: convert it with to-hf, then name the copy"
        )
    return Path(target)


def from_peft(
    source: str | Path,
    target: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Convert a PEFT LoRA or DoRA directory to mlx-lm's adapter format; return its path.

    Raises UserError if PEFT's settings mean more than a scaled product, or if the weights are pickled or damaged.
    """
    source = _directory(source)
    config = read_object(source / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{source} is a {config.get('peft_type')!r} adapter; only LORA is converted")
    for key, meaning in _REFUSED.items():
        if config.get(key):
            raise UserError(f"{source / ADAPTER_CONFIG}: {key} {meaning}, which mlx-lm's adapters cannot express")
    if config.get("bias", "none") != "none":
        raise UserError(f"{source / ADAPTER_CONFIG}: bias {config['bias']!r} is not converted")
    initial = str(config.get("init_lora_weights", ""))
    if initial.lower().startswith(_BASE_CHANGING):
        raise UserError(f"{source / ADAPTER_CONFIG}: {initial} also changed the base's weights; not converted")
    if not (source / PEFT_WEIGHTS).is_file() and (source / "adapter_model.bin").is_file():
        raise UserError(f"{source} holds only pickled weights, which can run any code: save it as safetensors")
    dora = bool(config.get("use_dora"))
    modules = _group(_read(source / PEFT_WEIGHTS), _THEIRS, _BACK, source / PEFT_WEIGHTS)
    rank = _check(modules, dora, source / PEFT_WEIGHTS, axis=1)
    base = _recorded(config.get("base_model_name_or_path"))
    remedy = f"make base_model_name_or_path in {ADAPTER_CONFIG} the base's directory"
    _check_embeddings(modules, dora, base, source / PEFT_WEIGHTS, remedy)
    if config.get("r") != rank:
        raise UserError(f"{source / ADAPTER_CONFIG} says r = {config.get('r')!r}, but the weights have {rank}")
    keys, num_layers = _keys(modules, _reaches_every_layer(config))
    mlx_config = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": rank,
            "scale": _number(config, "lora_alpha", source) / (math.sqrt(rank) if config.get("use_rslora") else rank),
            "dropout": _number(config, "lora_dropout", source, 0.0),
            "keys": keys,
        },
    }
    if base:
        mlx_config["model"] = base
    tensors = [_tensor(f"{path}.{leaf}", array) for path, leaves in modules.items() for leaf, array in leaves.items()]
    _write(target, ADAPTERS, tensors, mlx_config, "mlx", overwrite, source, progress)
    return Path(target)


def alpha(scale: float, rank: int) -> float | int:
    """The lora_alpha for which lora_alpha / rank is `scale`: exactly if such a float64 exists, else the nearest."""
    product = scale * rank
    candidates = (product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf))
    value = min(candidates, key=lambda candidate: abs(candidate / rank - scale))
    return int(value) if value == int(value) else value


def _directory(source: str | Path) -> Path:
    source = Path(source)
    with reading(source):
        if not source.is_dir():
            raise UserError(f"{source} is not an adapter directory")
    return source


def _recorded(base: Any) -> str | None:
    """How an adapter's config names its base: a directory by its absolute path, a repository by its name."""
    if not isinstance(base, str) or not base:
        return None
    return base if _base_config(base) is None else str(Path(base).resolve())


def _base_config(base: str | None) -> dict[str, Any] | None:
    """The config of an adapter's base; None if `base` is not a model directory on this machine."""
    try:
        exists = base is not None and (Path(base) / CONFIG).is_file()
    except (OSError, ValueError):  # a name that no directory can have
        return None
    return read_config(base) if exists and base else None


def _check_embeddings(modules: Modules, dora: bool, base: str | None, where: Path, remedy: str) -> None:
    """UserError if embeddings are adapted and mlx-lm and PEFT would, or could, compute different things.

    If the base ties its output projection to the embedding, mlx-lm adapts both and PEFT only the embedding. DoRA
    norms an embedding's rows in mlx-lm and its columns in PEFT.
    """
    name = next((path for path in sorted(modules) if _EMBEDDING.fullmatch(path)), None)
    if name is None:
        return
    if dora:
        raise UserError(f"{where} adapts {name} with DoRA, which mlx-lm and PEFT compute differently")
    config = _base_config(base)
    if config is None:
        raise UserError(f"{where} adapts {name}; whether the base ties its output to it is unknown: {remedy}")
    if config.get("tie_word_embeddings") is not False:
        raise UserError(f"{where} adapts {name}, to which {base} ties its output; PEFT would not adapt the output")


def _number(config: Mapping[str, Any], key: str, where: Path, default: float | None = None) -> float:
    """A finite number of an adapter's config."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where / ADAPTER_CONFIG}: {key} must be a number, not {value!r}")
    return float(value)


def _read(path: Path) -> dict[str, mx.array]:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    return load_lazily(read_header(path)[0])


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
        if match["leaf"] in ("lora_A", "lora_B") and _EMBEDDING.fullmatch(match["path"]):
            unknown.append(name)  # PEFT ignores an embedding's factors under these names
            continue
        leaf = leaves.get(match["leaf"], match["leaf"])
        modules[match["path"]][leaf] = array.T if array.ndim == 2 else array
    refuse([f"unexpected {name} {tuple(arrays[name].shape)}" for name in unknown], str(where))
    if not modules:
        raise UserError(f"{where} holds no adapter")
    return dict(modules)


def _check(modules: Modules, dora: bool, where: Path, axis: int) -> int:
    """The rank that all modules have, on `axis` of lora_a; UserError that lists the modules that do not fit."""
    wanted = {"lora_a", "lora_b", "m"} if dora else {"lora_a", "lora_b"}
    wrong = [f"{path} has {', '.join(sorted(m))}" for path, m in modules.items() if set(m) != wanted]
    refuse(wrong, f"{where} should hold {', '.join(sorted(wanted))} of each module")
    wrong, ranks = [], set()
    for path, leaves in modules.items():
        a, b = leaves["lora_a"].shape, leaves["lora_b"].shape
        ranks.add(int(a[axis]))
        magnitudes = dora and not _EMBEDDING.fullmatch(path)  # an embedding's are refused by _check_embeddings
        if a[axis] != b[1 - axis] or 0 in (*a, *b) or (magnitudes and leaves["m"].shape != (b[axis],)):
            wrong.append(f"{path} {a} {b}")
    refuse(wrong, f"{where}: factors that do not fit each other")
    if len(ranks) != 1:
        raise UserError(f"{where}: its modules have ranks {sorted(ranks)}, but mlx-lm's adapters have one")
    return ranks.pop()


def _targets(modules: Modules, num_layers: Any) -> dict[str, Any]:
    """PEFT's target_modules and layers_to_transform for exactly these modules."""
    by_layer = _by_layer(modules)
    if by_layer is None or len({frozenset(names) for names in by_layer.values()}) != 1:
        return {"target_modules": sorted(modules)}  # full names, which match only themselves
    layers = sorted(by_layer)
    names = sorted(next(iter(by_layer.values())))
    every = layers == list(range(len(layers))) and num_layers == len(layers)
    return {"target_modules": names, "layers_to_transform": None if every else layers}


def _reaches_every_layer(config: Mapping[str, Any]) -> bool:
    """Whether PEFT's settings adapt the same modules in every layer of the base.

    A pattern, excluded modules, chosen layers, or names with a layer's number may all leave out the last layers.
    """
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return False
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return targets == "all-linear"
    return isinstance(targets, list) and not any(re.search(r"(^|\.)\d+(\.|$)", str(name)) for name in targets)


def _keys(modules: Modules, every_layer: bool) -> tuple[list[str], int]:
    """mlx-lm's keys and num_layers for exactly these modules.

    Keys inside a layer count from the last layer back, so they are used only if every layer is adapted; else the
    keys are full names.
    """
    by_layer = _by_layer(modules)
    if by_layer is None:
        return sorted(modules), len(modules)
    numbers = sorted(by_layer)
    same = len({frozenset(names) for names in by_layer.values()}) == 1
    if every_layer and same and numbers == list(range(len(numbers))):
        return sorted(by_layer[0]), len(numbers)
    return sorted(modules), len(numbers)


def _by_layer(modules: Modules) -> dict[int, set[str]] | None:
    """The adapted modules of each layer; None if a module is outside the layers."""
    layers: dict[int, set[str]] = defaultdict(set)
    for path in modules:
        match = _LAYER.fullmatch(path)
        if match is None:
            return None
        layers[int(match["number"])].add(match["module"])
    return dict(layers)


def _tensor(name: str, array: mx.array) -> Tensor:
    return Tensor(name, tuple(array.shape), array.dtype, lambda: mx.contiguous(array))


def _write(
    target: str | Path,
    weights: str,
    tensors: list[Tensor],
    config: Mapping[str, Any],
    framework: str,
    overwrite: bool,
    source: Path,
    progress: Callable[[str], None] | None,
) -> None:
    with new_directory(target, overwrite=overwrite, sources=[source]) as directory:
        write_safetensors(directory / weights, tensors, {"format": framework})
        write_json(directory / ADAPTER_CONFIG, config)
    if progress:
        progress(f"wrote {len(tensors)} tensors to {target}")
