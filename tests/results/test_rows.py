"""results.json: what is written is read back, unknown keys stay, merging loses nothing, wrong values are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_linearard.errors import UserError
from mlx_linearard.files import RunDir
from mlx_linearard.results.fields import Field, visible
from mlx_linearard.results.info import ExportInfo, RunInfo
from mlx_linearard.results.objectives import combine_runs
from mlx_linearard.results.records import read_steps, training_of, write_pieces
from mlx_linearard.results.rows import Results, Row, SuiteResult, Value
from mlx_linearard.results.store import read_results, update_results, write_results

TEST = {
    "a": "restored",
    "b": "scaled",
    "n": 4,
    "difference": 0.5,
    "low": None,
    "high": None,
    "p": 0.5,
    "test": "McNemar",
    "outcome": "inside the noise",
    "words": "restored against scaled: inside the noise (p = 0.5)",
}
SUITES = {
    "ppl": {
        "metrics": {"perplexity@64": {"value": 20.5, "stderr": 0.5, "n": 8}},
        "by_length": {"64": 20.5},
        "by_position": [{"start": 0, "end": 64, "perplexity": 20.5}],
        "options": {"tokens": 64},
        "items": "restored-ppl-1.jsonl",
    },
    "passkey": {
        "metrics": {"accuracy": {"value": 0.5, "stderr": None, "n": 1}},
        "grid": {"64": {"0": 1.0, "50": 0.0}},
        "of another version": [1],
    },
}
FULL: dict[str, Any] = {
    "native": {"perplexity": {"64": 20.0, "256": 18.0}, "kl": 0.0, "agreement": 1.0},
    "scaled": {"perplexity": {"64": 90.0, "256": 80.0}, "kl": None, "agreement": None},
    "restored": {
        "perplexity": {"64": 21.0, "256": 19.0},
        "kl": 0.25,
        "agreement": 0.875,
        "new": {"x": 1},
        **SUITES,
        "training": {"tokens": 64, "seconds": 1.5, "tokens_per_second": 42.67, "peak_memory_gb": 0.5},
    },
    "comparisons": {
        "ppl": {
            "against": "native",
            "metrics": {
                "perplexity@64": {
                    "restored": {
                        "value": 20.5,
                        "stderr": 0.5,
                        "n": 8,
                        "percent_of_native": 97.0,
                        "recovered": 99.0,
                        "tests": [TEST],
                    }
                }
            },
        }
    },
    "export": {"max_difference": 0.001, "kl": 1e-7, "tokens": 64, "tolerance": 0.001, "unstable": ["the export"]},
    "run": {
        "method": "yarn",
        "factor": 4.0,
        "objective": "logits",
        "native_window": 64,
        "training_tokens": 64,
        "steps": 1,
        "skipped_steps": 0,
        "exported_step": 1,
        "seconds": 2.5,
        "machine": "a Mac",
        "processes": 1,
        "versions": {"mlx": "0.32.4"},
        "note": "of another version",
    },
    "other": "text",
}


def test_a_file_is_read_and_written_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(FULL))
    results = read_results(path)
    assert results.as_json() == FULL
    assert results.rows["restored"].suites["passkey"].grid == {64: {0: 1.0, 50: 0.0}}
    assert results.comparisons["ppl"].metrics["perplexity@64"]["restored"].tests[0].b == "scaled"
    write_results(path, results)
    assert json.loads(path.read_text()) == FULL and read_results(path) == results


def test_merging_replaces_a_suite_and_keeps_all_else(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(FULL))
    new = Results({"restored": Row(suites={"ppl": SuiteResult({"x": Value(1.0)})}), "extra": Row({32: 5.0}, 0.5)})
    expected = json.loads(json.dumps(FULL))
    expected["restored"]["ppl"] = {"metrics": {"x": {"value": 1.0, "stderr": None}}}
    expected["extra"] = {"perplexity": {"32": 5.0}, "kl": 0.5, "agreement": None}
    assert update_results(path, lambda old: old.merged(new)).as_json() == expected == json.loads(path.read_text())
    update_results(path, lambda old: old.without(["extra", "nothing"]))
    assert "extra" not in json.loads(path.read_text())


@pytest.mark.parametrize(
    "row",
    [Row({64: float("nan")}), Row({64: 1.0}, kl=float("inf")), Row(suites={"s": SuiteResult({"m": Value(1e400)})})],
)
def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path, row: Row) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(FULL))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"results\.json: new\..* must be a finite number, not (nan|inf)"):
        update_results(path, lambda old: old.merged(Results({"new": row})))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("restored", "agreement"), 2, "restored.agreement must be a number from 0 to 1, not 2"),
        (("restored", "kl"), "low", "restored.kl must be a finite number, not 'low'"),
        (("restored", "perplexity", "64"), 0, "restored.perplexity.64 must be above 0"),
        (("restored", "perplexity"), {"0": 1.0}, "has the key '0', which is not a length in tokens"),
        (("restored", "perplexity"), {"٣": 1.0}, "has the key '٣', which is not a length in tokens"),
        (("restored", "ppl", "by_position"), {}, "by_position must be a JSON list, not a dict"),
        (("restored", "ppl", "items"), 3, "restored.ppl.items must be a string, not 3"),
        (("restored", "training", "tokens"), 1.5, "tokens must be a whole number, 0 or more, not 1.5"),
        (("run", "native_window"), "8192", "run.native_window must be a whole number"),
        (("run", "native_window"), 10**99, "must be a whole number, 0 or more, not an integer of more than 60 digits"),
        (("run",), [1], "run must be a JSON object, not a list"),
        (("export", "unstable"), "x", "export.unstable must be a JSON list"),
        (
            ("comparisons", "ppl", "metrics", "perplexity@64", "restored", "tests"),
            [{**TEST, "outcome": "lost"}],
            "outcome must be one of better, worse, equal",
        ),
        (
            ("comparisons", "held-out"),
            {"metrics": {"kl": {"scaled": {"value": 1.0}}}, "best": {"kl": "ce"}},
            "comparisons.held-out.kl must have the rows of scaled and of the best objective",
        ),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, path: tuple[str, ...], value: Any, says: str) -> None:
    changed = json.loads(json.dumps(FULL))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(UserError) as error:
        Results.from_json(changed, Field(tmp_path / "results.json"))
    assert says in str(error.value) and "results.json: " in str(error.value) and "\n" not in str(error.value)


def test_an_export_says_whether_it_failed() -> None:
    assert not ExportInfo().failed and not ExportInfo(kl=0.001, tolerance=0.01).failed
    assert ExportInfo(kl=0.15, tolerance=0.01).failed
    not_finite = ExportInfo(kl=float("nan"), max_difference=float("inf"), tolerance=0.01)
    kept = ExportInfo.from_json(json.loads(json.dumps(not_finite.as_json())), Field("r.json"))
    assert kept.kl is None and kept.max_difference is None and kept.failed


def test_hidden_characters_are_shown() -> None:
    assert visible("a\x1b[31m\u202eb\ud800\nc\td") == "a\ufffd[31m\ufffdb\ufffd\nc\td"


# ---------------------------------------------------------------------------------------------------
# Steps, and the runs of several objectives


def a_finished_run(root: Path, kl: float) -> RunDir:
    run = RunDir(root)
    rows = {
        "native": Row({64: 20.0}, 0.0, 1.0),
        "scaled": Row({64: 90.0}, 1.5, 0.5),
        "restored": Row({64: 21.0}, kl, 0.9),
    }
    root.mkdir()
    write_results(run.results, Results(rows, run=RunInfo(method="yarn", steps=2, machine="a Mac")))
    pieces = {name: {"kl": {f"64/0/{i}": (row.kl or 0.0) + i / 100 for i in range(8)}} for name, row in rows.items()}
    write_pieces(run.held_out, pieces)
    step = {"loss": 1.0, "peak_memory_gb": 0.5, "tokens": 64, "seconds": 0.5}
    run.metrics.write_text("".join(json.dumps({"step": n, **step}) + "\n" for n in (1, 2)))
    return run


def test_steps_are_read_as_far_as_they_are_written(tmp_path: Path) -> None:
    run = a_finished_run(tmp_path / "run", 0.2)
    with run.metrics.open("a") as file:
        file.write(
            json.dumps({"step": 3, "loss": None, "skipped": "spike", "peak_memory_gb": 0.75}) + '\n{"step": 4, "lo'
        )
    steps = read_steps(run.metrics)
    assert [(step.step, step.loss) for step in steps] == [(1, 1.0), (2, 1.0), (3, None)]
    assert training_of(steps).as_json() == {
        "tokens": 128,
        "seconds": 1.0,
        "tokens_per_second": 128.0,
        "peak_memory_gb": 0.75,
    }
    for line, says in (
        ("{", "line 4 is not valid JSON"),
        ('{"step": 1}', "line 4 is not a valid step record"),
        ('{"step": -1, "loss": 1, "peak_memory_gb": 1}', "line 4.step must be a whole number"),
    ):
        text = run.metrics.read_text().rpartition("\n")[0]
        run.metrics.write_text(f"{text}\n{line}\n")
        with pytest.raises(UserError, match=says):
            read_steps(run.metrics)
        run.metrics.write_text(text + "\n")


def test_finished_runs_make_one_table(tmp_path: Path) -> None:
    runs = {name: a_finished_run(tmp_path / name, kl) for name, kl in (("relation", 0.3), ("logits", 0.2))}
    results = combine_runs(runs, "relation")
    assert list(results.rows) == ["native", "scaled", "restored", "relation", "logits"]
    assert results.rows["restored"] == results.rows["relation"] and results.rows["logits"].kl == 0.2
    assert results.comparisons["held-out"].best == {"kl": "logits"}
    assert results.run and results.run.training_tokens == 128 and results.run.seconds == 2.0 and not results.run.steps
    assert combine_runs({}, "relation") == Results()
    assert "restored" not in combine_runs({"logits": runs["logits"]}, "relation").rows


@pytest.mark.parametrize("file", ["results.json", "held_out.json"])
def test_a_run_without_its_restored_model_is_named(tmp_path: Path, file: str) -> None:
    run = a_finished_run(tmp_path / "ce", 0.3)
    value = json.loads((run.root / file).read_text())
    del value["restored"]
    (run.root / file).write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"ce is not a finished run: remove it, and train ce again with --resume"):
        combine_runs({"ce": run}, "ce")
