"""mlx's limits: each flag reaches mlx in MiB, and an impossible limit is refused."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

from mlx_linearard.errors import UserError
from mlx_linearard.machine import set_limits


@pytest.fixture(autouse=True)
def limits_as_before() -> Iterator[None]:
    memory, cache = mx.get_memory_limit(), mx.set_cache_limit(0)
    mx.set_cache_limit(cache)
    yield
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)


def test_memory_and_cache_limits_reach_mlx() -> None:
    set_limits(memory_limit=3000, cache_limit=70)
    assert mx.get_memory_limit() == 3000 << 20
    assert mx.set_cache_limit(0) == 70 << 20


def test_a_limit_that_is_not_given_stays() -> None:
    before = mx.get_memory_limit()
    set_limits()
    assert mx.get_memory_limit() == before


def test_a_wired_limit_is_refused_without_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    before = mx.get_memory_limit()
    with pytest.raises(UserError, match="--wired-limit 100: only Metal"):
        set_limits(wired_limit=100, memory_limit=3000)
    assert mx.get_memory_limit() == before


def test_a_wired_limit_on_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def wire(limit: int) -> None:
        asked.append(limit)
        if limit > 1 << 30:
            raise ValueError("[metal::set_wired_limit] Setting a wired limit larger than\nthe maximum is not allowed.")

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "set_wired_limit", wire)
    set_limits(wired_limit=100)
    assert asked == [100 << 20]
    with pytest.raises(UserError, match=r"--wired-limit 2000: .*iogpu.wired_limit_mb"):
        set_limits(wired_limit=2000)
