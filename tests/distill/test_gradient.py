"""Compiled, joined and kept: other ways to the same loss and the same gradients."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from tiny import tiny_model

from mlx_linearard.distill import gradient
from mlx_linearard.distill.gradient import BlockLoss, Gradients
from mlx_linearard.distill.kept import NOTHING, Kept
from mlx_linearard.distill.memory import keeping, plan_memory
from mlx_linearard.distill.objective import resolve_objective
from mlx_linearard.distill.step import Schedule, TrainState, _updated, train_step
from mlx_linearard.distill.vectors import Layout, VectorUpdate, can_join
from mlx_linearard.models.pair import Pair, load_pair

TOKENS = mx.array([[(7 * i * i + 3 * i + j) % 256 for i in range(49)] for j in range(2)])
OBJECTIVES = [("relation", "last"), ("relation", "all"), ("logits", "last"), ("ce", "last"), ("relation+logits", "all")]


def pair_of(folder: Path, dtype: str = "float32", **options: object) -> Pair:
    return load_pair(tiny_model(folder, dtype=dtype), method="linear", factor=4.0, lora_rank=4, **options)


def parameters_of(pair: Pair) -> list[dict[str, mx.array]]:
    """Adapters with random values: at the start B is zero, and A has no gradient."""
    mx.random.seed(1)
    return [{k: v + 0.05 * mx.random.normal(v.shape) for k, v in leaves.items()} for leaves in pair.parameters()]


def same(one: object, other: object) -> bool:
    pairs = zip(tree_flatten(one), tree_flatten(other), strict=True)
    return all(a[0] == b[0] and bool(mx.array_equal(a[1], b[1])) for a, b in pairs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_layers_that_keep_their_activations_give_the_same_bits(tmp_path: Path, dtype: str, kind: str) -> None:
    pair = pair_of(tmp_path / "m", dtype, fine_tune_type=kind)
    gradients_of, parameters = Gradients(pair, compiles=False), parameters_of(pair)
    for name, layers in OBJECTIVES:
        objective = resolve_objective(pair.student, name, layers=layers)
        expected = gradients_of(BlockLoss(objective), parameters, {"tokens": TOKENS})
        assert any(bool(mx.any(g != 0)) for _, g in tree_flatten(expected[2]))
        for kept in (Kept(1), Kept(3), Kept(0, 3), Kept(1, 1)):
            loss = BlockLoss(dataclasses.replace(objective, kept=kept))
            assert same(gradients_of(loss, parameters, {"tokens": TOKENS}), expected), (name, layers, kept)


def test_dropout_is_the_same_whether_activations_are_kept(tmp_path: Path) -> None:
    pair = pair_of(tmp_path / "m", lora_dropout=0.5)
    gradients_of, parameters = Gradients(pair, compiles=False), parameters_of(pair)
    objective = resolve_objective(pair.student, "logits")
    found = [
        gradients_of(BlockLoss(dataclasses.replace(objective, kept=kept)), parameters, {"tokens": TOKENS}, seed)
        for kept, seed in ((NOTHING, 7), (Kept(3), 7), (Kept(0, 3), 7), (Kept(3), 8))
    ]
    assert same(found[0], found[1]) and same(found[0], found[2]) and not same(found[1], found[3])
    assert not Gradients(pair, compiles=True).compiles


@pytest.mark.usefixtures("compiling")
@pytest.mark.slow  # mlx compiles for the CPU with g++, which takes a minute
@pytest.mark.parametrize(("name", "layers"), OBJECTIVES)
def test_compiled_steps_are_the_same(tmp_path: Path, name: str, layers: str) -> None:
    ends = []
    for compiles in (False, True):
        pair = pair_of(tmp_path / "m")
        objective, schedule = resolve_objective(pair.student, name, layers=layers), Schedule(9, 2, 2, 0.01, 0, 0, 5, 0)
        state, gradients_of = TrainState.start(pair, schedule), Gradients(pair, compiles=compiles)
        if compiles:
            state.update = VectorUpdate(mx.compile(partial(_updated, state.optimizer)))
        records = [
            train_step(pair, objective, schedule, state, [TOKENS, TOKENS + i], gradients_of=gradients_of)
            for i in range(3)
        ]
        assert gradients_of.failure is None and gradients_of.compiles == compiles
        ends.append((records, tree_flatten([state.parameters, state.optimizer.state])))
    (plain, expected), (compiled, found) = ends
    assert [r.loss for r in compiled] == pytest.approx([r.loss for r in plain], rel=1e-5)
    assert [r.grad_norm for r in compiled] == pytest.approx([r.grad_norm for r in plain], rel=1e-4)
    for (key, a), (other, b) in zip(expected, found, strict=True):
        assert key == other and mx.allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("at", ["building", "running"])
def test_a_function_that_does_not_compile_runs_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    pair = pair_of(tmp_path / "m")
    parameters, loss = parameters_of(pair), BlockLoss(resolve_objective(pair.student, "ce"))
    expected = Gradients(pair, compiles=False)(loss, parameters, {"tokens": TOKENS})

    class Compiler:
        def compile(self, function):
            def fails(*arguments):
                raise RuntimeError("no\ncompiler here")

            return fails

        def __getattr__(self, name: str):
            return getattr(mx, name)

    monkeypatch.setattr(gradient, "mx", Compiler())
    gradients_of = Gradients(pair, compiles=True)
    if at == "running":  # a shape that has run before fails for another reason
        gradients_of._built.add((loss, ("tokens", TOKENS.dtype, *TOKENS.shape)))
        with pytest.raises(RuntimeError, match="compiler"):
            gradients_of(loss, parameters, {"tokens": TOKENS})
        return
    found = gradients_of(loss, parameters, {"tokens": TOKENS})
    assert gradients_of.failure == "no compiler here" and not gradients_of.compiles
    assert same(found[:2], expected[:2])
    assert same(Layout.of(parameters).split(found[2]), expected[2])


def test_a_layout_splits_what_it_joins() -> None:
    leaves = [{"b": mx.arange(6.0).reshape(2, 3), "a": mx.array(7.0)}, {}, {"c": mx.arange(4.0)}]
    layout = Layout.of(leaves)
    assert same(layout.split(layout.join(leaves)), leaves)
    assert can_join(leaves) and not can_join([{"a": mx.array(1.0), "b": mx.array(1)}]) and not can_join([{}])


def test_joined_updates_are_those_of_single_arrays() -> None:
    """Three updates, one with joined gradients, and one from restored arrays: bit for bit."""
    gradients = [{"a": mx.full((2, 3), 0.5), "b": mx.array([1.0, -1.0, 2.0, 0.25])}]
    ends = []
    for joins in (False, True):
        parameters = [{"a": mx.ones((2, 3)), "b": -mx.ones((4,))}]
        optimizer = optim.AdamW(learning_rate=0.1, weight_decay=0.01)
        optimizer.init({"layers": parameters})
        state, update = optimizer.state, partial(_updated, optimizer)
        if joins:
            update = VectorUpdate(update)
        for step, scale in enumerate((1.0, 0.5, 2.0)):
            given = Layout.of(gradients).join(gradients) if joins and step == 1 else gradients
            if step == 2:  # as after a checkpoint: the same numbers in other containers
                parameters = [dict(layer) for layer in parameters]
            parameters, state, finite = update(parameters, state, given, mx.array(scale))
            assert finite.item()
        ends.append([parameters, state])
    assert same(*ends)


def test_auto_keeps_what_fits_and_none_keeps_all() -> None:
    from test_memory import STEP

    from mlx_linearard.config import DistillConfig

    deep = dataclasses.replace(STEP, layers=12, logits="ce", seq_len=2048)
    half, full = Kept(attention=12), Kept(whole=12)
    least, middle, most = (plan_memory(dataclasses.replace(deep, kept=kept)).total for kept in (NOTHING, half, full))
    assert least < middle < most
    assert keeping(deep, DistillConfig(recompute="all"), 1 << 50).kept == NOTHING
    assert keeping(deep, DistillConfig(recompute="feed-forward"), 1).kept == half
    assert keeping(deep, DistillConfig(recompute="none"), 1).kept == full
    assert keeping(deep, DistillConfig(), 2 * least - 2).kept == NOTHING
    assert keeping(deep, DistillConfig(), 2 * middle).kept == Kept(1, 11)  # what the last layer keeps is needed at once
    assert keeping(deep, DistillConfig(), 2 * most).kept == full
    for limit in ((least + middle) // 2, (middle + most) // 2):
        some = keeping(deep, DistillConfig(), 2 * limit)
        assert plan_memory(some).total <= limit
        whole, attention = some.kept.whole, some.kept.attention
        assert 0 < attention < 12 and (whole == 0 if limit < middle else 1 < whole == 12 - attention)
        more = Kept(whole, attention + 1) if limit < middle else Kept(whole + 1, attention - 1)
        assert plan_memory(dataclasses.replace(some, kept=more)).total > limit
    limited = keeping(deep, DistillConfig(memory_limit=most >> 20), 1 << 50)
    assert 0 < limited.kept.whole <= 12 and plan_memory(limited).total <= most
