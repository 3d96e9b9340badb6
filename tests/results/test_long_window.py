"""The second sentence of the verdict: each branch, its colour, and the command that follows from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_linearard.results.fields import Field
from mlx_linearard.results.long_window import long_window
from mlx_linearard.results.moods import BAD, GOOD, PARTLY, UNKNOWN, both
from mlx_linearard.results.next_steps import next_steps
from mlx_linearard.results.rows import ExportInfo, Results, Row, RunInfo, Value
from mlx_linearard.results.statistics import margin
from mlx_linearard.results.verdict import Measured, mood, verdict

WINDOW = 8192


def far(*gains: tuple[int, float, float | None, int]) -> dict[str, Any]:
    """The suite `far` with (length, gain, standard error, texts)."""
    return {"far": {"metrics": {f"gain@{n}": {"value": g, "stderr": e, "n": k} for n, g, e, k in gains}}}


def ruler(**points: float) -> dict[str, Any]:
    metrics = {f"average@{name[1:]}": {"value": v, "stderr": 1.0, "n": 160} for name, v in points.items()}
    return {"ruler": {"metrics": metrics}}


def results(native: dict[str, Any], restored: dict[str, Any], scaled_kl: float = 1.0, kl: float = 0.1) -> Results:
    rows = {
        "native": {"perplexity": {"2048": 30.0}, "kl": 0.0, **native},
        "scaled": {"perplexity": {"2048": 90.0}, "kl": scaled_kl},
        "restored": {"perplexity": {"2048": 31.0}, "kl": kl, **restored},
    }
    run = {"native_window": WINDOW, "method": "yarn", "objective": "logits", "steps": 4, "exported_step": 4}
    return Results.from_json({**rows, "run": run}, Field("results.json"))


LONG_TEXT = {"perplexity": {"2048": 31.0, "16384": 29.0}}
BROKEN = {"perplexity": {"2048": 31.0, "16384": 90.0}}
CASES: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({}, {}, UNKNOWN, "Whether the long window is used was not measured."),
    ({}, LONG_TEXT, UNKNOWN, "was not measured; long text does not break the model: perplexity is 29.00 at 16384"),
    (
        {},
        BROKEN,
        BAD,
        "window is not used: perplexity is 90.00 at 16384 tokens, against 30.00 native at 2048.",
    ),
    ({}, far((16384, 0.05, 0.01, 32)), GOOD, "is used: text beyond the old window helps to predict, by 0.05 ± 0.01"),
    ({}, far((16384, 0.05, 0.03, 3)), UNKNOWN, "is not certain: the gain from text beyond the old window, 0.05 ± 0.03"),
    ({}, far((16384, 0.05, None, 1)), UNKNOWN, "on too few texts to be sure"),
    ({}, far((16384, 0.001, 0.002, 32)), BAD, "is not used: text beyond the old window does not help to predict"),
    ({}, far((16384, -0.2, 0.02, 32)), BAD, "makes predictions worse, by -0.2 ± 0.02 nats per token at 16384 tokens"),
    ({}, far((8192, 0.05, 0.01, 32)), UNKNOWN, "was not measured."),  # not beyond the native window
    ({}, far((16384, 0.05, 0.01, 32), (32768, -0.2, 0.02, 32)), PARTLY, "in part: text beyond the old window helps"),
    ({}, {**far((16384, 0.05, 0.01, 32)), **BROKEN}, PARTLY, "; but perplexity is 90.00 at 16384 tokens"),
    (ruler(_4096=40.0), ruler(_16384=39.0), GOOD, "is used: RULER at 16384 tokens: 39.0% against 40.0% native at 4096"),
    (ruler(_4096=40.0), ruler(_16384=5.0), BAD, "is not used: RULER at 16384 tokens: 5.0% against 40.0% native"),
    (ruler(_4096=40.0), {**ruler(_16384=5.0), **far((16384, 0.05, 0.01, 32))}, PARTLY, "; but RULER at 16384 tokens"),
    (ruler(_4096=0.0), ruler(_16384=0.0), UNKNOWN, "was not measured."),  # native cannot do it either
    (ruler(_16384=40.0), ruler(_16384=39.0), UNKNOWN, "was not measured."),  # nothing inside the native window
]


@pytest.mark.parametrize(("native", "restored", "expected", "says"), CASES)
def test_the_long_window(native: dict[str, Any], restored: dict[str, Any], expected: str, says: str) -> None:
    measured = Measured(results(native, restored))
    found = long_window(measured.results, "restored", WINDOW)
    assert says in found.sentence and found.mood == expected
    short, long = verdict(measured)
    assert short.startswith("Short text is restored:") and long == found.sentence
    assert mood(measured) == both(GOOD, expected)
    commands = [" ".join(map(str, words)) for step in next_steps(measured, Path("run")) for words in step.commands]
    assert any("--long-weight 0.2 --output run-long" in line for line in commands) == (expected in (BAD, PARTLY))
    assert any("--suite far" in line for line in commands) == (expected == UNKNOWN)


def test_a_ruler_result_that_may_be_chance_decides_nothing() -> None:
    few = ruler(_16384=25.0)
    few["ruler"]["metrics"]["average@16384"]["stderr"] = 12.0
    assert "is not certain: RULER at 16384" in verdict(Measured(results(ruler(_4096=40.0), few)))[1]


def test_no_window_no_conclusion() -> None:
    assert long_window(results({}, far((16384, 0.05, 0.01, 32))), "restored", None).mood == UNKNOWN


@pytest.mark.parametrize(
    ("kl", "long", "expected"),
    [
        (0.1, GOOD, GOOD),
        (0.1, BAD, PARTLY),
        (0.5, GOOD, PARTLY),
        (0.5, BAD, PARTLY),
        (0.5, UNKNOWN, UNKNOWN),
        (0.95, GOOD, BAD),
        (0.95, UNKNOWN, BAD),
        (1.2, BAD, BAD),
    ],
)
def test_the_box_has_the_colour_of_both_sentences(kl: float, long: str, expected: str) -> None:
    gains = {GOOD: [(16384, 0.05, 0.01, 32)], BAD: [(16384, -0.2, 0.02, 32)], UNKNOWN: []}[long]
    assert mood(Measured(results({}, far(*gains) if gains else {}, kl=kl))) == expected


def test_a_run_that_is_not_finished_or_not_exported_well() -> None:
    done = results({}, far((16384, 0.05, 0.01, 32)))
    bad = Results(done.rows, export=ExportInfo(kl=1.0, tolerance=0.01), run=done.run)
    assert mood(Measured(done)) == GOOD and mood(Measured(bad)) == BAD
    unfinished = Measured(Results({"native": Row(kl=0.0), "scaled": Row(kl=1.0)}, run=RunInfo()))
    assert mood(unfinished) == UNKNOWN and verdict(unfinished) == [
        "The run is not finished, so there is no verdict yet."
    ]


def test_both_says_the_worse_but_partly_if_only_the_long_window_is_bad() -> None:
    table = {(s, n): both(s, n) for s in (GOOD, PARTLY, BAD, UNKNOWN) for n in (GOOD, PARTLY, BAD, UNKNOWN)}
    assert table[GOOD, BAD] == table[PARTLY, GOOD] == table[GOOD, PARTLY] == PARTLY
    assert {value for (short, _), value in table.items() if short == BAD} == {BAD}
    assert table[GOOD, UNKNOWN] == table[PARTLY, UNKNOWN] == UNKNOWN


@pytest.mark.parametrize(
    ("n", "quantile"), [(2, 12.706), (3, 4.303), (11, 2.228), (13, 2.179), (33, 2.037), (500, 1.965)]
)
def test_the_margin_is_students(n: int, quantile: float) -> None:
    assert margin(Value(1.0, 2.0, n)) == pytest.approx(2 * quantile, abs=0.05)
    assert margin(Value(1.0, None, n)) is None


def test_gains_are_read_as_they_are_written_and_checked() -> None:
    entry = {"metrics": {}, "gain_by_position": {"512": [{"start": 10, "end": 20, "gain": -0.5, "stderr": 0.1}]}}
    row = {"native": {"far": entry}}
    assert Results.from_json(json.loads(json.dumps(row)), Field("f")).as_json()["native"]["far"] == entry
    for broken in (
        {"start": 20, "end": 20, "gain": 0.0},
        {"start": 1, "end": 2},
        {"start": 1, "end": 2, "gain": 1e300},
    ):
        with pytest.raises(Exception, match=r"f: native\.far\.gain_by_position\.512"):
            Results.from_json({"native": {"far": {"metrics": {}, "gain_by_position": {"512": [broken]}}}}, Field("f"))
