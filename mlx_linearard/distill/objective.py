"""The loss: attention relations, the teacher's logits or plain cross-entropy, as one scalar of the adapters.

Teacher and student run layer by layer, as pairs. One closure per layer runs both, consumes q, k and v inside
the layer, and returns the hidden states, the relation losses and the gradients of the losses in q, k and v.
Nothing else of the layer is kept; the backward pass recomputes the student's half of the layer from its input.
`Objective.kept` names layers that keep activations instead: the same operations, more memory, less time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import UserError
from ..machine import on_gpu
from ..models.adapters import Leaves, holding
from ..models.layers import Call, attention_of, enter, head, run_layer
from ..models.pair import Pair
from ..models.shape import Shape
from ..ops.attention import attention_in_training, attention_no_grad
from ..ops.fused import Choice
from ..ops.logits import cross_entropy, logits_kl
from ..ops.mlp import PositionWise, in_chunks, width_of
from ..ops.relation import relation_kl_with_grad
from ..ops.tiling import first, in_order
from .kept import NOTHING, Kept
from .memory import relation_workspace

RELATIONS = "qkv"


@dataclass(frozen=True)
class Objective:
    """A resolved objective. `layers` are the supervised layers, ascending; empty without relations."""

    layers: tuple[int, ...]
    relations: str = RELATIONS
    normalization: str = "heads"
    relation_weight: float = 1.0
    logits_weight: float = 0.0
    ce_weight: float = 0.0
    workspace_bytes: int = 256 << 20
    attention: Choice | None = None  # which attention runs under a gradient; None: the default, without a probe
    kept: Kept = NOTHING  # which of the layers that run keep activations

    @property
    def needs_logits(self) -> bool:
        return self.logits_weight > 0 or self.ce_weight > 0

    @property
    def needs_teacher(self) -> bool:
        return bool(self.layers) or self.logits_weight > 0

    def last_layer(self, total: int) -> int:
        """The last layer that has to run: the model's last one if logits are needed, else the last supervised one."""
        return total - 1 if self.needs_logits else self.layers[-1]


def resolve_objective(
    model: nn.Module,
    name: str,
    *,
    layers: str = "last",
    relations: str = RELATIONS,
    normalization: str = "heads",
    relation_weight: float = 1.0,
    logits_weight: float = 1.0,
    workspace_bytes: int = 256 << 20,
) -> Objective:
    """The options of an objective, resolved for a model; UserError for layers that the model does not have."""
    related = "relation" in name
    return Objective(
        layers=supervised_layers(model, layers) if related else (),
        relations="".join(r for r in RELATIONS if r in relations),
        normalization=normalization,
        relation_weight=relation_weight,
        logits_weight=logits_weight if "logits" in name else 0.0,
        ce_weight=1.0 if name == "ce" else 0.0,
        workspace_bytes=workspace_bytes,
    )


def supervised_layers(model: nn.Module, layers: str) -> tuple[int, ...]:
    """`last`, `all` or `0,5,11` as layer indices; UserError for layers without attention."""
    available = [i for i, layer in enumerate(model.layers) if attention_of(layer)]
    if not available:
        raise UserError(
            "no layer of this model calls an attention function that is supported: use --objective logits or ce"
        )
    if layers == "last":
        return (available[-1],)
    if layers == "all":
        return tuple(available)
    wanted = sorted({int(part) for part in layers.split(",")})
    if wrong := [i for i in wanted if i not in available]:
        raise UserError(f"--layers {layers}: layers with attention are {available[0]} to {available[-1]}, not {wrong}")
    return tuple(wanted)


def objective_loss(
    pair: Pair,
    objective: Objective,
    parameters: list[Leaves],
    tokens: mx.array,
    dropout_seed: int | None = None,
    weights: mx.array | None = None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """The loss of one batch and its parts, a differentiable scalar of `parameters`.

    Args:
        parameters: the adapted layers' trainable arrays, as `Pair.parameters` lists them.
        tokens: (B, T + 1) int32; the models read the first T.
        dropout_seed: the seed of this batch's dropout; None without dropout.
        weights: (B, T) float32, the factor of each target in the sum of cross-entropy; None for the mean of all.
    Returns:
        (loss, parts): float32 scalars; parts are unweighted, in nats (relation_q, relation_k, relation_v, logits, ce).
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    hidden_t, hidden_s, relations = _run_layers(pair, objective, parameters, inputs, dropout_seed)
    parts = dict(zip([f"relation_{r}" for r in objective.relations], relations, strict=False))
    total = objective.relation_weight * sum(parts.values(), mx.array(0.0))
    limit = objective.workspace_bytes
    if objective.logits_weight:
        parts["logits"] = logits_kl(hidden_s, hidden_t, head(pair.student), head(pair.teacher), workspace_bytes=limit)
        total = total + objective.logits_weight * parts["logits"]
    if objective.ce_weight:
        reduction = "mean" if weights is None else "sum"
        parts["ce"] = cross_entropy(
            hidden_s, head(pair.student), targets, mask=weights, reduction=reduction, workspace_bytes=limit
        )
        total = total + objective.ce_weight * parts["ce"]
    return total, parts


def student_hidden(
    pair: Pair, objective: Objective, parameters: list[Leaves], inputs: mx.array, dropout_seed: int | None = None
) -> mx.array:
    """The student's hidden state after all layers, (B, T, width), a differentiable function of `parameters`.

    `objective` must need the logits, and not the teacher. The other arguments are those of `objective_loss`.
    """
    return _run_layers(pair, objective, parameters, inputs, dropout_seed)[1]


def _run_layers(
    pair: Pair, objective: Objective, parameters: list[Leaves], inputs: mx.array, dropout_seed: int | None
) -> tuple[mx.array, mx.array, list[mx.array]]:
    """Both hidden states after the last layer that has to run, and each relation's loss, averaged over the layers."""
    hidden_t, calls_t = enter(pair.teacher, inputs)
    hidden_s, calls_s = enter(pair.student, inputs)
    leaves_of = dict(zip(pair.adapter.layers, parameters, strict=True))
    total = len(calls_s)
    last = objective.last_layer(total)
    losses = []
    for index in range(last + 1):
        layer = _PairedLayer(
            pair,
            objective,
            index,
            calls_t[index],
            calls_s[index],
            supervised=index in objective.layers,
            stops=index == last and not objective.needs_logits,
            keeps=objective.kept.of_layer(last - index),
            dropout_seed=None if dropout_seed is None else dropout_seed * total + index,
        )
        hidden_t, hidden_s, loss = layer(hidden_t, hidden_s, leaves_of.get(index, {}))
        if loss is not None:
            losses.append(loss)
    if not losses:
        return hidden_t, hidden_s, []
    mean = sum(losses[1:], losses[0]) / len(losses)
    return hidden_t, hidden_s, [mean[i] for i in range(len(objective.relations))]


@dataclass(frozen=True)
class _PairedLayer:
    """One layer of teacher and student as a function whose backward pass recomputes the student's half, or keeps it.

    It holds modules and options, and no arrays of the batch: the graph keeps only the function's arguments alive.
    """

    pair: Pair
    objective: Objective
    index: int
    call_t: Call
    call_s: Call
    supervised: bool
    stops: bool  # True: nothing after this layer's q, k, v is needed
    keeps: tuple[bool, bool]  # whether the student's activations stay in memory: attention's, the feed-forward part's
    dropout_seed: int | None

    def __call__(
        self, hidden_t: mx.array, hidden_s: mx.array, leaves: Leaves
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        names = list(leaves)
        if any(self.keeps):
            return self._keeping(names, hidden_t, hidden_s, *leaves.values())
        function: Any = mx.custom_function(partial(self._forward, names))
        function.vjp(partial(self._backward, names))
        hidden_t, hidden_s, losses, *_ = function(hidden_t, hidden_s, *leaves.values())
        return hidden_t, hidden_s, losses if self.supervised else None

    def _keeping(
        self, names: list[str], hidden_t: mx.array, hidden_s: mx.array, *leaves: mx.array
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        """The same as plain operations, whose activations mlx keeps for the backward pass."""
        next_s, *qkv_s = self._student(names, hidden_s, *leaves)
        if not self.objective.needs_teacher:
            return hidden_t, next_s, None
        next_t, qkv_t, scale_t = self._teacher(mx.stop_gradient(hidden_t))
        if not self.supervised:
            return next_t, next_s, None

        @mx.custom_function
        def relations(*qkv: mx.array) -> list[mx.array]:
            losses, gradients = self._relations(list(qkv[: len(qkv_s)]), list(qkv[len(qkv_s) :]), scale_t)
            return [losses, *gradients]

        @relations.vjp
        def _(primals: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
            return [*_scaled(outputs[1:], cotangents[0]), *(mx.zeros_like(y) for y in primals[len(qkv_s) :])]

        losses: mx.array = first(relations(*qkv_s, *qkv_t))
        return (hidden_t, hidden_s, losses) if self.stops else (next_t, next_s, losses)

    def _forward(self, names: list[str], hidden_t: mx.array, hidden_s: mx.array, *leaves: mx.array) -> list[mx.array]:
        """[teacher hidden, student hidden, losses (R,), dq, dk, dv]; the gradients are those of the losses."""
        next_s, *qkv_s = self._student(names, hidden_s, *leaves)
        if not self.objective.needs_teacher:
            return [hidden_t, next_s, mx.array(0.0)]
        next_t, qkv_t, scale_t = self._teacher(hidden_t)
        if not self.supervised:
            return [next_t, next_s, mx.array(0.0)]
        losses, gradients = self._relations(qkv_s, qkv_t, scale_t)
        if self.stops:  # all outputs of a custom function are evaluated, so no output may need work that nobody uses
            next_t, next_s = hidden_t, hidden_s
        return [next_t, next_s, losses, *gradients]

    def _relations(self, qkv_s: list[mx.array], qkv_t: list[mx.array], scale: float) -> tuple[mx.array, list[mx.array]]:
        losses, gradients = list[mx.array](), list[mx.array]()
        workspace = self._relation_workspace(qkv_s[0])
        for student, teacher in zip(qkv_s, qkv_t, strict=True):
            # One relation after another: otherwise their tiles would be in memory at the same time.
            student, teacher = in_order([student, teacher], [*losses[-1:], *gradients[-1:]])
            loss, gradient = relation_kl_with_grad(
                student,
                teacher,
                scale_student=scale,
                scale_teacher=scale,
                workspace_bytes=workspace,
            )
            weight = self._weight(student.shape[1])
            losses.append(loss * weight)
            gradients.append(gradient * mx.array(weight, gradient.dtype))
        return mx.stack(losses), gradients

    def _relation_workspace(self, related: mx.array) -> int:
        """The workspace of the relations of arrays (B, H, T, D)."""
        shape, tokens = Shape.of(self.pair.native_config), related.shape[0] * related.shape[2]
        limit, relations = self.objective.workspace_bytes, self.objective.relations
        return relation_workspace(limit, shape, relations, tokens, related.dtype.size, gpu=on_gpu())

    def _weight(self, heads: int) -> float:
        """1, or with the normalization of the paper's code the relation's number of heads over the query heads."""
        if self.objective.normalization == "heads":
            return 1.0
        located = attention_of(self.pair.student.layers[self.index])
        assert located is not None
        attention_module = located[1]
        queries = getattr(attention_module, "n_heads", None) or getattr(attention_module, "num_heads", None)
        if queries is None:
            raise UserError("--normalization paper-code: this architecture does not name its number of query heads")
        return heads / queries

    def _teacher(self, hidden: mx.array) -> tuple[mx.array, list[mx.array], float]:
        seen: list[mx.array] = []
        scales: list[float] = []

        def attend(queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, **more: Any) -> mx.array:
            seen.extend(_pick(self.objective.relations, queries, keys, values))
            scales.append(scale)
            if self.stops:
                return _nothing(queries, values)
            return attention_no_grad(
                queries, keys, values, scale=scale, workspace_bytes=self.objective.workspace_bytes, **more
            )

        layer = self.pair.teacher.layers[self.index]
        next_hidden = run_layer(layer, hidden, self.call_t, attend, self._in_chunks)
        return next_hidden, seen, scales[0] if scales else 1.0

    def _student(self, names: list[str], hidden: mx.array, *leaves: mx.array) -> list[mx.array]:
        """[hidden state after the layer, q, k, v]: the half of the layer that the backward pass runs again."""
        seen: list[mx.array] = []

        def attend(queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, **more: Any) -> mx.array:
            seen.extend(_pick(self.objective.relations, queries, keys, values))
            if self.stops:
                return _nothing(queries, values)
            return attention_in_training(
                queries,
                keys,
                values,
                scale=scale,
                choice=self.objective.attention,
                workspace_bytes=self.objective.workspace_bytes,
                **more,
            )

        layer = self.pair.student.layers[self.index]
        if self.dropout_seed is not None:
            mx.random.seed(self.dropout_seed)  # the same dropout in both passes
        with holding(layer, dict(zip(names, leaves, strict=True))):
            next_hidden = run_layer(layer, hidden, self.call_s, attend, self._feed_forward)
        return [next_hidden, *(seen if self.supervised else [])]

    def _in_chunks(self, feed_forward: PositionWise, recompute: bool = False) -> PositionWise:
        width, workspace = width_of(self.pair.native_config), self.objective.workspace_bytes
        return in_chunks(feed_forward, width, workspace, recompute=recompute)

    def _feed_forward(self, part: PositionWise) -> PositionWise:
        """The student's feed-forward part, as it is if its activations are kept."""
        attention, whole = self.keeps
        return part if whole else self._in_chunks(part, recompute=attention)

    def _backward(
        self, names: list[str], primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
    ) -> list[mx.array]:
        hidden_t, hidden_s, *leaves = primals
        _, ct_hidden, ct_losses, *_ = cotangents
        ct_qkv = _scaled(outputs[3:], ct_losses)
        # Recompute only when the gradient has arrived: otherwise all recomputed layers would be in memory.
        hidden_s, *leaves = mx.depends([hidden_s, *leaves], [ct_hidden, *ct_qkv])
        half: Callable[..., list[mx.array]] = partial(self._student, names)
        if self.stops:  # the loss does not depend on anything after q, k, v
            _, gradients = mx.vjp(lambda *x: half(*x)[1:], [hidden_s, *leaves], ct_qkv)
        else:
            _, gradients = mx.vjp(half, [hidden_s, *leaves], [ct_hidden, *ct_qkv])
        return [mx.zeros_like(hidden_t), *gradients]


def _scaled(gradients: Sequence[mx.array], cotangents: mx.array) -> list[mx.array]:
    """The gradient of each loss times the loss's cotangent; the cotangents are (R,)."""
    return [g * cotangents[i].astype(g.dtype) for i, g in enumerate(gradients)]


def _pick(relations: str, *qkv: mx.array) -> list[mx.array]:
    return [x for name, x in zip(RELATIONS, qkv, strict=True) if name in relations]


def _nothing(queries: mx.array, values: mx.array) -> mx.array:
    """Zeros in the shape of an attention output that is not needed."""
    return mx.zeros((*queries.shape[:3], values.shape[-1]), queries.dtype)
