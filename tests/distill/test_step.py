"""The update as a function of its arguments, which a GPU compiles."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_linearard.distill.guard import Guard
from mlx_linearard.distill.step import Snapshot, TrainState, _update, _updated


def state_of(value: float = 1.0) -> TrainState:
    optimizer = optim.AdamW(learning_rate=0.1, weight_decay=0.01)
    parameters = [{"a": mx.full((2, 3), value), "b": mx.full((4,), -value)}]
    optimizer.init({"layers": parameters})
    return TrainState(0, parameters, optimizer, Snapshot(parameters, dict(optimizer.state)), Guard())


GRADIENTS = [{"a": mx.full((2, 3), 0.5), "b": mx.array([1.0, -1.0, 2.0, 0.25])}]


def test_updates_are_those_of_the_optimizer() -> None:
    """Three steps with changing rates against mlx's own optimizer, bit for bit."""
    ours, theirs = state_of(), optim.AdamW(learning_rate=0.1, weight_decay=0.01)
    parameters = {"layers": state_of().parameters}
    for rate in (0.1, 0.05, 0.2):
        assert _update(ours, GRADIENTS, mx.array(2.7), rate, clip=0.0) is None
        theirs.learning_rate = mx.array(rate)
        parameters = theirs.apply_gradients({"layers": GRADIENTS}, parameters)
        for name, array in parameters["layers"][0].items():
            np.testing.assert_array_equal(np.array(ours.parameters[0][name]), np.array(array))
    assert ours.optimizer.state["step"].item() == 3


def test_the_norm_is_clipped() -> None:
    clipped, scaled = state_of(), state_of()
    assert _update(clipped, GRADIENTS, mx.array(4.0), 0.1, clip=1.0) is None
    assert _update(scaled, [{k: g / 4 for k, g in GRADIENTS[0].items()}], mx.array(1.0), 0.1, clip=0.0) is None
    for name in ("a", "b"):
        np.testing.assert_allclose(
            np.array(clipped.parameters[0][name]), np.array(scaled.parameters[0][name]), rtol=1e-6
        )


def test_an_update_depends_on_its_arguments_alone() -> None:
    state = state_of()
    arguments = (state.parameters, dict(state.optimizer.state), GRADIENTS, mx.array(1.0))
    first = _updated(state.optimizer, *arguments)
    second = _updated(state.optimizer, *arguments)
    for one, other in zip(first[0][0].values(), second[0][0].values(), strict=True):
        np.testing.assert_array_equal(np.array(one), np.array(other))
    assert first[1]["step"].item() == second[1]["step"].item() == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_leaves_all_as_it_was(bad: float) -> None:
    state = state_of()
    before, good = state.parameters, state.good
    moments = {name: np.array(array) for name, array in state.optimizer.state["layers"][0]["a"].items()}
    complaint = _update(state, [{"a": mx.full((2, 3), bad), "b": GRADIENTS[0]["b"]}], mx.array(1.0), 0.1, clip=0.0)
    assert complaint is not None and "finite" in complaint
    assert state.parameters is before and state.good is good
    assert state.optimizer.state["step"].item() == 0
    for name, array in state.optimizer.state["layers"][0]["a"].items():
        np.testing.assert_array_equal(np.array(array), moments[name])
