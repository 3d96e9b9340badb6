"""Progress: one changing line on a terminal, a line now and then in a pipe, and an estimate from the first line on."""

from __future__ import annotations

import io

import pytest

from mlx_linearard.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("mlx_linearard.progress.time.monotonic", lambda: now[0])
    return now


def test_the_time_left_is_known_from_the_first_line_on(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    for label, now, done in (
        ("ppl, a", 60.0, 100),
        ("ppl, a", 90.0, 150),
        ("ppl, a", 120.0, 200),
        ("ppl, b", 240.0, 50),
    ):
        clock[0] = now
        progress.tokens(label, done, 200)
    lines = stream.getvalue().splitlines()
    left = (60, 30, 0, 360)
    assert [line.split(", ")[-1] for line in lines] == [f"{duration(s)} left" if s else "done" for s in left]


def test_a_resumed_job_counts_only_its_own_part(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    for step in (901, 902):
        clock[0] += 20
        progress.update("training", f"step {step}", step, 1000, before=step - 1)
    assert stream.getvalue().splitlines() == ["step 901, 33 min left", "step 902, 33 min left"]


def test_the_same_job_may_come_again(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    for now, done in ((10.0, 5), (500.0, 1), (520.0, 2)):  # the first was stopped after 5 of 10
        clock[0] = now
        progress.tokens("a", done, 10)
    assert [line.split(", ")[1] for line in stream.getvalue().splitlines()] == [
        "10 s left",
        "74 min left",
        "34 min left",
    ]


def test_a_pipe_gets_a_line_every_ten_seconds(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    for second in range(1, 25):
        clock[0] = float(second)
        progress.tokens("a", second, 24)
    assert [line.split("/")[0] for line in stream.getvalue().splitlines()] == ["a: 10", "a: 20", "a: 24"]


def test_a_terminal_has_one_changing_line(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    stream = Terminal()
    progress = Progress(stream)
    clock[0] = 1.0
    progress.tokens("a", 1, 2)
    progress.say("a line of its own")
    progress.tokens("a name that is much longer than the terminal", 2, 2)
    shown = stream.getvalue()
    assert shown.startswith("\r\x1b[Ka: 1/2 tokens, 1 s left\r\x1b[Ka line of its own\n")
    assert shown.endswith("\r\x1b[Ka name that is much longer th\n")


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (7300, "2 h 02 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
