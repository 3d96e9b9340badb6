"""Teacher (native RoPE, frozen) and student (scaled RoPE, adapted) over ONE copy of the frozen weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, load_tokenizer

from . import rope
from .convert.safe import check_model_dir
from .errors import UserError, one_line
from .trees import named_arrays, named_modules, slot
from .walk import attention_of

# The projections that make q, k and v, as mlx-lm's attentions name them; the last four are fused.
QKV_NAMES = ("q_proj", "k_proj", "v_proj", "wq", "wk", "wv", "qkv_proj", "query_key_value", "Wqkv", "c_attn")

Leaves = dict[str, mx.array]  # trainable arrays of one layer, by their path inside it


@dataclass(frozen=True)
class Adapter:
    """What is trained: of which kind, and of which projections in which layers."""

    fine_tune_type: str  # lora, dora or full
    rank: int
    scale: float
    dropout: float
    keys: tuple[str, ...]  # paths inside a layer, such as self_attn.q_proj
    layers: tuple[int, ...]  # the layers that carry adapters

    def config(self, paths: list[str]) -> dict[str, Any]:
        """mlx-lm's adapter_config.json, for layers at `paths`. Adapters on some layers only are named in full."""
        keys: Iterable[str] = self.keys
        if len(self.layers) < len(paths):
            keys = [f"{paths[i]}.{key}" for i in self.layers for key in self.keys]
        parameters = {"rank": self.rank, "scale": self.scale, "dropout": self.dropout, "keys": list(keys)}
        return {
            "fine_tune_type": self.fine_tune_type,
            "num_layers": len(paths),
            "lora_parameters": parameters,
        }


@dataclass
class Pair:
    """Both models, their tokenizer and their configurations. `path` is the directory they were loaded from."""

    path: Path
    teacher: Any
    student: Any
    tokenizer: Any
    native_config: dict[str, Any]
    scaled_config: dict[str, Any]
    adapter: Adapter

    @property
    def native_window(self) -> int:
        return rope.native_window(self.native_config)

    def parameters(self) -> list[Leaves]:
        """The trainable arrays of each adapted layer, in the order of `adapter.layers`."""
        layers = self.student.layers
        return [dict(named_arrays(layers[i].trainable_parameters())) for i in self.adapter.layers]

    def set_parameters(self, parameters: list[Leaves]) -> None:
        """Put trained arrays into the student."""
        for index, leaves in zip(self.adapter.layers, parameters, strict=True):
            put(self.student.layers[index], leaves)


def put(layer: nn.Module, leaves: Leaves) -> None:
    """Set a layer's arrays by their paths."""
    for path, array in leaves.items():
        container, key = slot(layer, path)
        container[key] = array


@contextmanager
def holding(layer: nn.Module, leaves: Leaves) -> Iterator[None]:
    """The layer with other arrays in place, for as long as the block runs."""
    own = {path: container[key] for path in leaves for container, key in [slot(layer, path)]}
    try:
        put(layer, leaves)
        yield
    finally:
        put(layer, own)


def load_pair(
    path: str | Path,
    *,
    method: str,
    factor: float,
    fine_tune_type: str = "lora",
    lora_rank: int = 64,
    lora_scale: float = 2.0,
    lora_dropout: float = 0.0,
    adapt_layers: Iterable[int] | Callable[[Any], Iterable[int]] | None = None,
    dtype: str | None = None,
    seed: int = 0,
) -> Pair:
    """Load a model directory once and build teacher and student over the same arrays.

    Args:
        path: a local mlx-lm or Hugging Face directory (safetensors), quantized or not.
        method, factor: how the student's RoPE is scaled (`rope.scale_rope`).
        fine_tune_type: `lora` or `dora` adapters on the q, k, v projections, or `full`: the projections themselves.
        adapt_layers: the layers that get adapters, or a function of the model that says which; all by default.
        dtype: of the frozen weights in memory (quantized ones keep their bits); by default the file's own.
        seed: of the adapters' first values.
    Raises:
        UserError: where the directory, the family or the method does not allow it, with the reason.
    """
    path = Path(path)
    native = check_model_dir(path).config
    try:
        scaled = rope.scale_rope(native, method, factor)
    except ValueError as error:
        raise UserError(str(error)) from None
    teacher = load_frozen(path, native, dtype)
    student = share(teacher, scaled)
    if adapt_layers is None:
        adapt_layers = range(len(student.layers))
    chosen = tuple(sorted(adapt_layers(student) if callable(adapt_layers) else adapt_layers))
    adapter = Adapter(fine_tune_type, lora_rank, lora_scale, lora_dropout, qkv_keys(student), chosen)
    mx.random.seed(seed)
    adapt(student, adapter)
    tokenizer = tokenizer_of(path, native)
    return Pair(path, teacher, student, tokenizer, native, scaled, adapter)


def tokenizer_of(path: Path, config: dict[str, Any]) -> Any:
    """The tokenizer of a model directory; UserError where transformers cannot make one of its files."""
    try:
        return load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # it reads config.json too, and raises what its validators raise
        raise UserError(f"the tokenizer of {path} cannot be loaded: {one_line(error)[:200]}") from None


def load_frozen(path: Path, config: dict[str, Any], dtype: str | None = None) -> Any:
    """mlx-lm's model for `config` with the weights in `path`, frozen; never more than one copy in memory."""
    try:
        model, _ = load_model(path, lazy=True, model_config=config)
    except FileNotFoundError:
        raise UserError(f"{path} holds no model*.safetensors: give a model directory with its weights") from None
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} cannot be loaded: {one_line(error)}") from None
    if dtype is not None:
        model.set_dtype(getattr(mx, dtype))
    model.freeze()
    mx.eval(model.parameters())
    return model


def share(teacher: Any, config: dict[str, Any]) -> Any:
    """A second model of the teacher's class with `config`'s RoPE, over the teacher's own arrays.

    The new model's first weights are never evaluated, so no second copy exists at any time.
    """
    student = type(teacher)(type(teacher.args).from_dict(config))
    with_weights = [(name, module) for name, module in named_modules(teacher.leaf_modules()) if module.parameters()]
    student.update_modules(tree_unflatten(with_weights))
    student.update(teacher.parameters())
    student.freeze()
    student.eval()
    return student


def qkv_keys(model: Any) -> tuple[str, ...]:
    """Paths, inside a layer, of the projections that make q, k and v; UserError for an architecture without them."""
    for layer in model.layers:
        if found := attention_of(layer):
            path, attention = found
            if names := [name for name in QKV_NAMES if name in attention]:
                return tuple(f"{path}.{name}" for name in names)
    raise UserError(
        f"no layer of {model.model_type} calls scaled_dot_product_attention on q, k, v projections "
        "that are known here: this architecture is not supported"
    )


def adapt(student: Any, adapter: Adapter) -> None:
    """Make the adapted projections trainable, and nothing else."""
    for index in adapter.layers:
        layer = student.layers[index]
        if adapter.fine_tune_type == "full":
            _unshare(layer, adapter.keys)
            continue
        wrapped = _OneLayer(layer)
        parameters = {
            "rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout, "keys": set(adapter.keys),
        }  # fmt: skip
        linear_to_lora_layers(wrapped, 1, parameters, use_dora=adapter.fine_tune_type == "dora")
    student.train()  # dropout; the frozen modules have none
    mx.eval(student.trainable_parameters())


def drop_rows(student: Any, part: int, parts: int) -> None:
    """From here on, dropout is what one of `parts` equal parts of a batch's rows has where the batch is whole."""
    for layer in student.layers:
        for name, module in named_modules(layer.leaf_modules()):
            if type(module) is nn.Dropout:
                layer.update_modules(tree_unflatten([(name, _DropoutOfRows(module, part, parts))]))


class _DropoutOfRows(nn.Dropout):
    """Draws for all rows of a batch, of which it gets only some."""

    def __init__(self, whole: nn.Dropout, part: int, parts: int):
        super().__init__(1 - whole._p_1)
        self._p_1, self._part, self._parts = whole._p_1, part, parts

    def __call__(self, x: mx.array) -> mx.array:
        if self._p_1 == 1 or not self.training:
            return x
        rows, *rest = x.shape
        mask = mx.random.bernoulli(self._p_1, (rows * self._parts, *rest))[self._part * rows : (self._part + 1) * rows]
        return (mask * x) * (1 / self._p_1)


class _OneLayer(nn.Module):
    """A single layer as a model, so that mlx-lm's own conversion adapts exactly this one."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layers = [layer]


def _unshare(layer: nn.Module, keys: Iterable[str]) -> None:
    """Give the student its own trainable q, k, v: float32 masters of the shared arrays."""
    modules = dict(layer.named_modules())
    for key in keys:
        if key not in modules:
            continue
        old = modules[key]
        if not isinstance(old, nn.Linear):
            raise UserError(
                f"--fine-tune-type full cannot train {type(old).__name__} {key}: use lora or dora on a quantized "
                "model, or an unquantized one"
            )
        layer.update_modules(tree_unflatten([(key, MasterLinear(old))]))


class MasterLinear(nn.Linear):
    """A trainable linear layer that keeps float32 masters and computes in its input's dtype."""

    def __init__(self, source: nn.Linear):
        nn.Module.__init__(self)
        self.source_dtype = source.weight.dtype
        for name, value in source.parameters().items():
            self[name] = value.astype(mx.float32)

    def __call__(self, x: mx.array) -> mx.array:
        y = x @ self.weight.astype(x.dtype).T
        return y + self.bias.astype(x.dtype) if "bias" in self else y

    def as_linear(self) -> nn.Linear:
        """The layer in the source's dtype."""
        plain = nn.Linear(1, 1, bias="bias" in self)
        plain.update({name: value.astype(self.source_dtype) for name, value in self.parameters().items()})
        return plain


def layer_paths(model: Any) -> list[str]:
    """Each layer's path in its model, such as model.layers.0."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in model.layers]


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's arrays, bit for bit, to show that frozen weights stay frozen."""
    digest = hashlib.sha256()
    for name, array in sorted(named_arrays(model.parameters())):
        digest.update(name.encode())
        digest.update(np.array(array.view(mx.uint8)).tobytes())
    return digest.hexdigest()
