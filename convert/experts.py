"""The experts of a mixture in the layout of transformers' files: mlx-lm stacks them, one tensor per projection."""

from __future__ import annotations

import mlx.core as mx

_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def unstack(arrays: dict[str, mx.array], layout: str) -> dict[str, mx.array]:
    """The arrays with every stack of experts in the `layout` of `Family.experts`, lazily.

    `arrays` is emptied, so that each array is freed once it is written.
    """
    result: dict[str, mx.array] = {}
    gates = [name for name, array in arrays.items() if name.endswith(".gate_proj.weight") and array.ndim == 3]
    for prefix in (name.removesuffix(".gate_proj.weight") for name in sorted(gates)):
        stack = {
            name.removeprefix(f"{prefix}."): arrays.pop(name) for name in list(arrays) if name.startswith(f"{prefix}.")
        }
        result.update(_UNSTACK[layout](prefix.rpartition(".")[0], stack))
    result.update(arrays)
    arrays.clear()
    return result


def _listed(part: str, stack: dict[str, mx.array]) -> dict[str, mx.array]:
    """One tensor per expert and projection."""
    return {f"{part}.experts.{e}.{name}": array[e] for name, array in stack.items() for e in range(array.shape[0])}


def _mixtral(part: str, stack: dict[str, mx.array]) -> dict[str, mx.array]:
    return _listed(part, {f"{_MIXTRAL[name.partition('.')[0]]}.weight": array for name, array in stack.items()})


def _joined(part: str, stack: dict[str, mx.array]) -> dict[str, mx.array]:
    """Granite's: gate and up in one tensor (experts, 2 * inner, width), down in another."""
    both = mx.concatenate([stack["gate_proj.weight"], stack["up_proj.weight"]], axis=1)
    return {f"{part}.input_linear.weight": both, f"{part}.output_linear.weight": stack["down_proj.weight"]}


def _interleaved(part: str, stack: dict[str, mx.array]) -> dict[str, mx.array]:
    """gpt-oss's: rows of gate and up in turn, and every matrix transposed: (experts, in, out)."""

    def turns(leaf: str) -> mx.array:
        gate, up = stack[f"gate_proj.{leaf}"], stack[f"up_proj.{leaf}"]
        return mx.stack([gate, up], axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])

    return {
        f"{part}.experts.gate_up_proj": turns("weight").swapaxes(1, 2),
        f"{part}.experts.gate_up_proj_bias": turns("bias"),
        f"{part}.experts.down_proj": stack["down_proj.weight"].swapaxes(1, 2),
        f"{part}.experts.down_proj_bias": stack["down_proj.bias"],
    }


_UNSTACK = {"list": _listed, "w1w2w3": _mixtral, "joined": _joined, "interleaved": _interleaved}
