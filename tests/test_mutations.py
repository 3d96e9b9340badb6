"""Damaged YAML, JSONL, config.json and checkpoints: the outcome is a result or a UserError.

Two thousand mutations with the slow tests, two hundred in every run. A mutation changes bytes of a sound file
(overwrites, cuts, doubles), or puts an odd value in the place of a sound one.
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import PROSE, tiny_model

from mlx_linearard.config import DistillConfig, read_yaml, to_yaml
from mlx_linearard.data import read_documents
from mlx_linearard.distill import checkpoint
from mlx_linearard.distill.plan import inspect_model, plan_run
from mlx_linearard.distill.step import Best, Schedule, TrainState
from mlx_linearard.errors import UserError
from mlx_linearard.evaluate.suites.choice import check_choice
from mlx_linearard.evaluate.suites.items import read_items
from mlx_linearard.machine import Machine
from mlx_linearard.models.pair import Pair, load_pair

FEW, MANY = 40, 400  # of each of the five kinds of file
SCHEDULE = Schedule(9, 1, 1, 1e-3, 0, 0.0, 5.0, 0)
IDENTITY = {"model": "abc", "lora_rank": 4}

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.binary(max_size=4).map(repr),
    st.sampled_from([0, -1, 1, 3, 1 << 40, 1 << 70, 1e308, "linear", "llama", [], {}, [[]], {"type": "yarn"}]),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=3),
)  # fmt: skip
PLACES = st.integers(0, 10_007)  # taken modulo the number of places there are
BYTES = st.lists(st.tuples(PLACES, st.sampled_from("ocd"), st.binary(min_size=1, max_size=4)), max_size=4)
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def damaged(data: bytes, edits: list[tuple[int, str, bytes]]) -> bytes:
    """`data` with bytes overwritten (o), cut off (c) or doubled (d)."""
    for place, kind, new in edits:
        at = place % (len(data) + 1)
        if kind == "o":
            data = data[:at] + new + data[at + len(new) :]
        else:
            data = data[:at] if kind == "c" else data[:at] + data[max(0, at - 20) :]
    return data


def replaced(value: Any, place: int, odd: Any, *, drop: bool) -> Any:
    """A JSON value with one of its parts, at any depth, replaced by `odd` or removed."""
    value = copy.deepcopy(value)
    slots = list(_slots(value))
    holder, key = slots[place % len(slots)]
    if drop:
        del holder[key]
    else:
        holder[key] = odd
    return value


def _slots(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from _slots(value[key])


def only_our_error(use: Callable[[], object]) -> None:
    """`use` may raise nothing but a UserError with a message."""
    try:
        use()
    except UserError as error:
        assert str(error).strip()


def many(strategy: Any) -> Callable[[Callable[..., None]], Any]:
    """Two tests: one with a few mutations, and a slow one with many."""

    def of(check: Callable[..., None]) -> Any:
        @pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["few", "many"])
        def test(sound: Path, many: bool) -> None:
            @settings(max_examples=MANY if many else FEW, deadline=None, suppress_health_check=QUIET, database=None)
            @given(strategy)
            def mutate(mutation: Any) -> None:
                check(sound, mutation)

            mutate()

        return test

    return of


VALUES = st.tuples(PLACES, ODD, st.sampled_from([False, False, False, True]))
JSON_EDITS = VALUES | VALUES | VALUES | BYTES


def mutant_of_json(path: Path, mutation: Any) -> bytes:
    if isinstance(mutation, list):
        return damaged(path.read_bytes(), mutation)
    place, odd, drop = mutation
    return json.dumps(replaced(json.loads(path.read_text()), place, odd, drop=drop)).encode()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid file of every kind, and a folder `mutant` for the damaged copies."""
    root = tmp_path_factory.mktemp("sound")
    options = DistillConfig(model="a/b", steps=7, objective="relation", layers="0,1", eval_lengths="8,9")
    (root / "options.yaml").write_text(to_yaml(options))
    (root / "text.jsonl").write_text("".join(json.dumps({"text": PROSE, "n": i}) + "\n" for i in range(5)))
    items = [{"query": "a", "choices": ["b", "c"], "gold": 1}, {"query": "d", "choices": ["e"], "gold": 0}]
    (root / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    scaling = {"rope_type": "default"}
    tiny_model(root / "model", rope_parameters=scaling, rope_scaling=None, bits=4)
    state = TrainState.start(_pair(root / "model"), SCHEDULE)
    state.step, state.best = 3, Best(2, 0.5, 1, 3, "cafe")
    state.guard.accept(1.5)
    checkpoint.save(root / "checkpoints", state, IDENTITY)
    (root / "mutant").mkdir()
    return root


@functools.cache
def _pair(folder: Path) -> Pair:
    return load_pair(folder, method="linear", factor=4.0, lora_rank=2)


@many(JSON_EDITS)
def test_yaml(sound: Path, mutation: Any) -> None:
    body = (sound / "options.yaml").read_bytes()
    if isinstance(mutation, list):
        body = damaged(body, mutation)
    else:
        place, odd, drop = mutation
        body = yaml.safe_dump(replaced(yaml.safe_load(body), place, odd, drop=drop)).encode()
    file = sound / "mutant" / "options.yaml"
    file.write_bytes(body)
    only_our_error(lambda: DistillConfig(**read_yaml(file)))


@many(st.tuples(st.sampled_from(["text.jsonl", "items.jsonl"]), st.integers(0, 1), JSON_EDITS))
def test_jsonl(sound: Path, mutation: Any) -> None:
    name, line, edits = mutation
    if isinstance(edits, list):
        body = damaged((sound / name).read_bytes(), edits)
    else:
        place, odd, drop = edits
        lines = [json.loads(text) for text in (sound / name).read_text().splitlines()]
        lines[line] = replaced(lines[line], place, odd, drop=drop)
        body = "".join(json.dumps(item) + "\n" for item in lines).encode()
    file = sound / "mutant" / name
    file.write_bytes(body)
    only_our_error(lambda: list(read_documents(str(file))))
    only_our_error(lambda: [check_choice(item, where) for where, item in read_items(str(file))])


@many(st.tuples(st.sampled_from(["linear", "ntk", "yarn", "llama3"]), JSON_EDITS))
def test_config(sound: Path, mutation: Any) -> None:
    method, edits = mutation
    folder = _copy(sound / "model", sound / "mutant" / "model", "config.json", edits)
    machine = Machine("test", False, 1 << 34, 100.0)
    options = DistillConfig(model=str(folder), method=method, lora_rank=2)
    only_our_error(lambda: list(plan_run(options, inspect_model(options, folder), machine).lines()))


def _load(sound: Path, name: str, edits: Any) -> None:
    """Load a checkpoint with a damaged file into a fresh copy of a run's state."""
    source = next((sound / "checkpoints").iterdir())
    folder = _copy(source, sound / "mutant" / source.name, name, edits)
    state = TrainState.start(_pair(sound / "model"), SCHEDULE)
    only_our_error(lambda: checkpoint.load(folder, state, IDENTITY))


@many(JSON_EDITS)
def test_state_json(sound: Path, mutation: Any) -> None:
    _load(sound, checkpoint.FACTS, mutation)


@many(BYTES)
def test_state_safetensors(sound: Path, mutation: Any) -> None:
    _load(sound, checkpoint.ARRAYS, mutation)


def _copy(source: Path, target: Path, name: str, edits: Any) -> Path:
    """A copy of a directory with its file `name` changed by `edits`."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    (target / name).write_bytes(mutant_of_json(source / name, edits))
    return target
