"""Runs a model layer by layer, and replaces attention inside one layer (the attention seam).

mlx-lm's models differ before, between and after their layers (embedding scales, masks, sliding windows, soft
caps). This file repeats none of that. For one call, stand-ins replace the layers, so the model's own code makes
the first hidden state, the arguments of each layer, and the logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import UserError
from ..ops.attention import attention_no_grad
from ..ops.gated_delta import gated_delta
from ..ops.mlp import in_chunks
from ..rope import FAMILIES
from .trees import slot, walk_modules
from .written_out import written_out

SEAM = "scaled_dot_product_attention"  # the function that every mlx-lm attention calls in its module's namespace
FEED_FORWARD = {row.feed_forward for row in FAMILIES.values()}  # the position-wise part of a layer
RECURRENCE = "gated_delta_update"  # the function of the linear-attention layers whose gradient ops/gated_delta.py has
Attend = Callable[..., mx.array]
Wrap = Callable[[Callable[[mx.array], mx.array]], Callable[[mx.array], mx.array]]


@dataclass(frozen=True)
class Call:
    """The arguments of a layer beside the hidden state: masks and caches."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class _StandIn:
    """Replaces a layer in a model's list; its attributes are those of the layer."""

    def __init__(self, layer: nn.Module, run: Callable[[mx.array, Call], mx.array]):
        self._layer, self._run = layer, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, hidden: mx.array, *arguments: Any, **keywords: Any) -> mx.array:
        return self._run(hidden, Call(arguments, keywords))


@contextlib.contextmanager
def _stand_ins(model: Any, run: Callable[[int, mx.array, Call], mx.array]) -> Iterator[None]:
    layers = _own_list(model)
    real = list(layers)
    try:
        layers[:] = [_StandIn(layer, partial(run, i)) for i, layer in enumerate(real)]
        yield
    finally:
        layers[:] = real


def _own_list(model: Any) -> list[Any]:
    """The list of layers that the model itself iterates over; `model.layers` may be a copy of it."""
    first = model.layers[0]
    for _, module in walk_modules(model):  # lazily: a head is called once per chunk
        for value in module.values():
            if isinstance(value, list) and value and value[0] is first:
                return value
    raise UserError(f"{model.model_type} does not keep its layers in one list: not supported")


def enter(model: Any, tokens: mx.array) -> tuple[mx.array, list[Call]]:
    """The hidden state before the first layer, (B, T, width), and the other arguments of each layer.

    Raises UserError for an architecture that does not call its layers once each, in order, on one hidden state.
    """
    calls: list[Call] = []
    first: list[mx.array] = []

    def record(index: int, hidden: mx.array, call: Call) -> mx.array:
        if index != len(calls) or not isinstance(hidden, mx.array):
            raise UserError(f"the layers of {model.model_type} are not called in a plain sequence: not supported")
        if index == 0:
            first.append(hidden)
        calls.append(call)
        return hidden

    with _stand_ins(model, record):
        model(tokens)
    if len(calls) != len(model.layers):
        raise UserError(
            f"only {len(calls)} of the {len(model.layers)} layers of {model.model_type} are called: not supported"
        )
    return first[0], calls


def head(model: Any) -> Callable[[mx.array], mx.array]:
    """The part of the model after its last layer, a function of hidden (B, C, width) that returns logits (B, C, V).

    The function treats each position by itself.
    """

    def logits(hidden: mx.array) -> mx.array:
        with _stand_ins(model, lambda index, h, call: hidden):
            return model(mx.zeros(hidden.shape[:2], dtype=mx.int32))

    return logits


def hidden_at(
    model: Any, tokens: mx.array, positions: mx.array, cache: list[Any] | None = None
) -> tuple[mx.array, Callable[[mx.array], mx.array]]:
    """The hidden state after the last layer at some positions, (1, N, width), and the head that makes logits of it.

    `positions` (N,) are places in the flattened `tokens` (B, T). No logits are computed here. If an architecture does
    not call its layers once each, in order, on one hidden state, the result is its logits (1, N, V) and a head that
    returns them as they are.
    """
    found: list[mx.array] = []
    size = tokens.size

    def run(index: int, hidden: mx.array, call: Call) -> mx.array:
        hidden = real[index](hidden, *call.arguments, **call.keywords)
        if index == len(real) - 1 and isinstance(hidden, mx.array) and hidden.shape[:2] == tokens.shape:
            found.append(hidden.reshape(size, -1)[positions][None])
        return hidden

    try:
        real = list(_own_list(model))
    except UserError:
        logits = model(tokens, cache=cache)
    else:
        with _stand_ins(model, run):
            logits = model(tokens, cache=cache)  # a lazy graph: the head is not computed unless its result is used
    if len(found) == 1:
        return found[0], head(model)
    return logits.reshape(size, -1)[positions][None], lambda hidden: hidden


def attention_of(layer: nn.Module) -> tuple[str, nn.Module] | None:
    """(path in the layer, module) of the attention that calls `SEAM`, or that `written_out` knows; None without one."""
    for path, module in walk_modules(layer):
        if written_out(module) is not None:
            return path, module
        if _calls(module, SEAM):
            return path, module
    return None


def run_layer(
    layer: nn.Module, hidden: mx.array, call: Call, attend: Attend, wrap: Wrap = lambda part: part
) -> mx.array:
    """layer(hidden) with attention and feed-forward part replaced for this one call.

    `attend(q, k, v, *, scale, mask)` replaces attention, and `wrap(feed_forward)` the feed-forward part. `attend` gets
    `sinks` or `softcap` too if the layer has them. A layer of gated delta attention runs through ops/gated_delta.py,
    and any other layer without the seam as it is.
    """
    with _attending(layer, attend), _recurring(layer), _wrapped(layer, wrap):
        return layer(hidden, *call.arguments, **call.keywords)


@contextlib.contextmanager
def _attending(layer: nn.Module, attend: Attend) -> Iterator[None]:
    attention = attention_of(layer)
    if attention is None:
        yield
        return
    if computed := written_out(attention[1]):
        container, key = slot(layer, attention[0])
        container[key] = partial(computed, attention[1], attend)
        try:
            yield
        finally:
            container[key] = attention[1]
        return
    with _naming(attention[1], SEAM, _seam(attend)):
        yield


@contextlib.contextmanager
def _recurring(layer: nn.Module) -> Iterator[None]:
    modules = (module for _, module in walk_modules(layer) if _calls(module, RECURRENCE))
    if (module := next(modules, None)) is None:
        yield
        return
    with _naming(module, RECURRENCE, _gated_delta):
        yield


@contextlib.contextmanager
def _naming(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace the function that the code of `module` calls by `name`, while the block runs."""
    namespace = type(module).__call__.__globals__
    original = namespace[name]
    namespace[name] = function
    try:
        yield
    finally:
        namespace[name] = original


def _calls(module: nn.Module, name: str) -> bool:
    """Whether the code of `module` calls the function `name` of its namespace."""
    code = getattr(type(module).__call__, "__code__", None)
    return code is not None and name in code.co_names and name in type(module).__call__.__globals__


def _gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    *rest: Any,
    use_kernel: bool = True,
) -> tuple[mx.array, None]:
    """`ops.gated_delta` with the arguments of mlx-lm's function; a layer without a cache has no state and no mask."""
    if any(value is not None for value in rest):
        raise ValueError("this layer runs without a cache")
    log_decay = -mx.exp(A_log.astype(mx.float32)) * nn.softplus(a + dt_bias)
    return gated_delta(q, k, v, log_decay, mx.sigmoid(b)), None


@contextlib.contextmanager
def _wrapped(layer: nn.Module, wrap: Wrap) -> Iterator[None]:
    original = {name: layer[name] for name in FEED_FORWARD if name in layer}
    dict.update(layer, {name: wrap(part) for name, part in original.items()})
    try:
        yield
    finally:
        dict.update(layer, original)


def _seam(attend: Attend) -> Attend:
    """`attend` with the arguments of mlx-lm's scaled_dot_product_attention."""

    def seam(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: Any = None,
        sinks: Any = None,
    ) -> mx.array:
        more = {} if sinks is None else {"sinks": sinks}
        return attend(queries, keys, values, scale=scale, mask=mask, **more)

    return seam


def forward_hidden(model: nn.Module, inputs: mx.array, *, feed_forward: int, workspace_bytes: int) -> mx.array:
    """The hidden state after all layers, (B, T, width), without a gradient and with one layer at a time in memory.

    `feed_forward` is the width of a position in the layers' feed-forward parts (`ops.mlp.width_of`).
    """
    hidden, calls = enter(model, inputs)
    wrap = partial(in_chunks, width=feed_forward, workspace=workspace_bytes)

    attend = partial(attention_no_grad, workspace_bytes=workspace_bytes)

    for layer, call in zip(model.layers, calls, strict=True):
        hidden = run_layer(layer, hidden, call, attend, wrap)
        mx.eval(hidden)
    return hidden
