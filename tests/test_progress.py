"""Progress: one changing line on a terminal, a line now and then in a pipe, and an estimate from the first line on."""

from __future__ import annotations

import io
import re
import sys

import pytest

from mlx_linearard.progress import Progress, duration, fitting, wrapped


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
        progress.update("training", [f"step {step}"], step, 1000, before=step - 1)
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


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 40 columns that can erase."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def shown(text: str) -> list[str]:
    """What a terminal shows in the end: text after a carriage return replaces the line."""
    return [re.sub(r".*\r(\x1b\[K)?", "", line) for line in text.split("\n")]


def test_a_terminal_has_one_changing_line(clock: list[float], terminal: Terminal) -> None:
    progress = Progress(terminal)
    clock[0] = 1.0
    progress.tokens("a", 1, 2)
    assert shown(terminal.getvalue())[-1].startswith(" 50%|") and "| a: 1/2 tokens, 1 s left" in terminal.getvalue()
    progress.say("a line of its own")
    progress.tokens("a", 2, 2)
    assert shown(terminal.getvalue()) == ["a line of its own", "a: 2/2 tokens, done", ""]


def test_a_line_stays_every_half_minute(clock: list[float], terminal: Terminal) -> None:
    progress = Progress(terminal)
    for second in range(1, 71):
        clock[0] = float(second)
        progress.tokens("a", second, 70)
    progress.clear()
    assert [line.split("/")[0] for line in shown(terminal.getvalue())] == ["a: 30", "a: 60", "a: 70", ""]


def test_only_whole_parts_are_shown(clock: list[float], terminal: Terminal) -> None:
    progress = Progress(terminal)
    clock[0] = 100.0
    progress.update("t", ["step 1/10: loss 1.5", "300 tokens/s", "peak 2.00 GB"], 1, 10)
    kept, changing = terminal.getvalue().split("\n")
    assert kept == "step 1/10: loss 1.5, 15 min left" and changing.endswith("| step 1/10: loss 1.5")
    assert fitting(["a", "b", "c"], 5) == "a, b" and fitting(["a long part"], 5) == "a long part"
    assert fitting(["数", "数"], 5) == "数" and fitting(["数", "数"], 6) == "数, 数"  # two columns each


def test_what_others_write_to_standard_error_has_a_line_of_its_own(
    clock: list[float], terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sys.stderr
    with Progress(terminal) as progress:
        progress.tokens("a", 1, 2)
        print("a warning", file=sys.stderr)
        assert shown(terminal.getvalue()) == [""] and capsys.readouterr().err == "a warning\n"
        progress.tokens("a", 1, 2)
    assert shown(terminal.getvalue()) == [""] and sys.stderr is before


def test_lines_break_between_words(terminal: Terminal) -> None:
    text = "the state after step 12 is saved in /a/path/that/is/much/longer/than/the/terminal/is/wide"
    Progress(terminal).say(text)
    lines = terminal.getvalue().splitlines()
    assert lines == ["the state after step 12 is saved in", f"  {text.split()[-1]}"]
    assert wrapped("a\n\n b", 20) == "a\n\n b" and wrapped(text, None) == text


@pytest.mark.parametrize("change", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": ""}])
def test_plain_lines_where_no_line_may_change(
    clock: list[float], terminal: Terminal, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with Progress(terminal) as progress:
        for second in range(1, 12):
            clock[0] = float(second)
            progress.update("t", [f"step {second}/11: loss 1.5", "300 tokens/s"], second, 11)
    assert terminal.getvalue() == "step 10/11: loss 1.5, 1 s left\nstep 11/11: loss 1.5, done, 300 tokens/s\n"


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (7300, "2 h 02 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
