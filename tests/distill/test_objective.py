"""The paired layers against plain autograd over whole models: same loss, same gradients, nothing else trained."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from tiny import tiny_model

from mlx_linearard.distill.objective import objective_loss, resolve_objective
from mlx_linearard.errors import UserError
from mlx_linearard.models.adapters import put
from mlx_linearard.models.layers import enter, head, run_layer
from mlx_linearard.models.pair import Pair, load_pair
from mlx_linearard.ops.relation import relation_kl_dense

TOKENS = mx.array([[(7 * i * i + 3 * i + j) % 256 for i in range(65)] for j in range(2)])


def some_parameters(pair: Pair) -> list[dict[str, mx.array]]:
    """Adapters with random values: at the start B is zero, and A has no gradient."""
    mx.random.seed(1)
    return [{k: v + 0.05 * mx.random.normal(v.shape) for k, v in leaves.items()} for leaves in pair.parameters()]


def naive_loss(pair: Pair, objective, parameters, tokens: mx.array) -> mx.array:
    """The same objective by its definition: whole forward passes, dense relations, whole logits."""

    def forward(model, leaves_by_layer):
        hidden, calls = enter(model, tokens[:, :-1])
        seen = []

        def attend(q, k, v, *, scale, mask):
            seen.append((scale, q, k, v))
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

        for index, (layer, call) in enumerate(zip(model.layers, calls, strict=True)):
            if index in leaves_by_layer:
                put(layer, leaves_by_layer[index])
            hidden = run_layer(layer, hidden, call, attend)
        return head(model)(hidden), seen

    own = pair.parameters()
    logits_t, seen_t = forward(pair.teacher, {})
    logits_s, seen_s = forward(pair.student, dict(zip(pair.adapter.layers, parameters, strict=True)))
    pair.set_parameters(own)
    total = mx.array(0.0)
    for index in objective.layers:
        scale, *qkv_t = seen_t[index]
        for name, s, t in zip("qkv", seen_s[index][1:], qkv_t, strict=True):
            if name in objective.relations:
                weight = 1.0 if objective.normalization == "heads" else s.shape[1] / seen_s[index][1].shape[1]
                loss = relation_kl_dense(s, t, scale_student=scale, scale_teacher=scale)
                total = total + objective.relation_weight * weight * loss / len(objective.layers)
    if objective.logits_weight:
        log_s, log_t = nn.log_softmax(logits_s), nn.log_softmax(logits_t)
        total = total + objective.logits_weight * (mx.exp(log_t) * (log_t - log_s)).sum(-1).mean()
    if objective.ce_weight:
        total = total + nn.losses.cross_entropy(logits_s, tokens[:, 1:], reduction="mean")
    return total


def relative(a, b) -> float:
    """Distance of two gradient trees over the size of the second, in Euclidean norms."""
    pairs = list(zip([x for _, x in tree_flatten(a)], [y for _, y in tree_flatten(b)], strict=True))
    return (sum(((x - y) ** 2).sum() for x, y in pairs) / sum((y**2).sum() for _, y in pairs)).sqrt().item()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("relation", {"layers": "last"}),
        ("relation", {"layers": "all", "relations": "qk"}),
        ("relation", {"layers": "0,1", "normalization": "paper-code", "relation_weight": 2.0}),
        ("logits", {}),
        ("relation+logits", {"layers": "all", "logits_weight": 0.5}),
        ("ce", {}),
    ],
)
def test_loss_and_gradients_are_those_of_the_definition(model_dir: Path, name: str, options: dict) -> None:
    pair = load_pair(model_dir, method="linear", factor=4.0, lora_rank=4)
    objective = resolve_objective(pair.student, name, **options)
    parameters = some_parameters(pair)
    expected, expected_grads = mx.value_and_grad(lambda p: naive_loss(pair, objective, p, TOKENS))(parameters)
    (loss, _), grads = mx.value_and_grad(lambda p: objective_loss(pair, objective, p, TOKENS))(parameters)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative(grads, expected_grads) < 3e-5


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_gradients_reach_every_adapter_and_nothing_outside_qkv(model_dir: Path, kind: str) -> None:
    pair = load_pair(model_dir, method="ntk", factor=4.0, fine_tune_type=kind, lora_rank=4)
    trainable = dict(tree_flatten(pair.student.trainable_parameters()))
    assert len({name.split(".")[4] for name in trainable}) == 3
    assert all(name.split(".")[4] in ("q_proj", "k_proj", "v_proj") for name in trainable)
    objective = resolve_objective(pair.student, "relation")
    parameters = pair.parameters() if kind == "full" else some_parameters(pair)
    grads = mx.grad(lambda p: objective_loss(pair, objective, p, TOKENS)[0])(parameters)
    sizes = {f"{i}.{name}": mx.abs(g).max().item() for i, leaves in enumerate(grads) for name, g in leaves.items()}
    assert len(sizes) == len(trainable)
    assert all(size > 0 for size in sizes.values()), {name: size for name, size in sizes.items() if size == 0}


def test_same_rope_gives_no_loss_and_no_gradient(model_dir: Path) -> None:
    pair = load_pair(model_dir, method="linear", factor=4.0, lora_rank=4)
    for student, teacher in zip(pair.student.layers, pair.teacher.layers, strict=True):
        student.self_attn.rope = teacher.self_attn.rope
    for name in ("relation", "logits"):
        objective = resolve_objective(pair.student, name, layers="all")
        (loss, _), grads = mx.value_and_grad(lambda p, o=objective: objective_loss(pair, o, p, TOKENS))(
            pair.parameters()
        )
        assert abs(loss.item()) < 1e-9
        assert all(mx.abs(g).max().item() < 1e-6 for _, g in tree_flatten(grads))


def test_dropout_is_the_same_in_the_recomputation(model_dir: Path) -> None:
    """The gradient uses the dropout mask of the loss: a finite difference shows it."""
    pair = load_pair(model_dir, method="linear", factor=4.0, lora_rank=4, lora_dropout=0.3)
    objective = resolve_objective(pair.student, "relation", layers="all")
    parameters = some_parameters(pair)
    direction = [{k: mx.random.normal(v.shape) for k, v in leaves.items()} for leaves in parameters]

    def at(step: float) -> float:
        moved = [{k: p[k] + step * d[k] for k in p} for p, d in zip(parameters, direction, strict=True)]
        return objective_loss(pair, objective, moved, TOKENS, 5)[0].item()

    grads = mx.grad(lambda p: objective_loss(pair, objective, p, TOKENS, 5)[0])(parameters)
    slope = sum((g[k] * d[k]).sum() for g, d in zip(grads, direction, strict=True) for k in g).item()
    assert (at(1e-3) - at(-1e-3)) / 2e-3 == pytest.approx(slope, rel=1e-2)
    assert objective_loss(pair, objective, parameters, TOKENS, 6)[0].item() != pytest.approx(at(0.0), rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "head_dim": 16},
        {"model_type": "mistral"},
        {"model_type": "phi3", "head_dim": None, "rope_scaling": None},
    ],
    ids=lambda changes: changes["model_type"],
)
def test_other_families_walk_the_same_way(tmp_path: Path, changes: dict) -> None:
    pair = load_pair(tiny_model(tmp_path / "m", **changes), method="linear", factor=2.0, lora_rank=4)
    objective = resolve_objective(pair.student, "relation+logits", layers="all")
    parameters = some_parameters(pair)
    expected, expected_grads = mx.value_and_grad(lambda p: naive_loss(pair, objective, p, TOKENS))(parameters)
    (loss, _), grads = mx.value_and_grad(lambda p: objective_loss(pair, objective, p, TOKENS))(parameters)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative(grads, expected_grads) < 3e-5


def test_layers_that_do_not_exist_are_refused(model_dir: Path) -> None:
    pair = load_pair(model_dir, method="linear", factor=4.0, lora_rank=4)
    with pytest.raises(UserError, match="0 to 2"):
        resolve_objective(pair.student, "relation", layers="0,7")
