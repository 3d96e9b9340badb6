"""The command: results are merged and never lost, a stopped run resumes, and each mistake prints one line."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model

from mlx_linearard.cli import run_command
from mlx_linearard.errors import UserError
from mlx_linearard.evaluate.__main__ import run
from mlx_linearard.evaluate.suites import hub
from mlx_linearard.evaluate.suites.choice import Choice
from mlx_linearard.results.fields import Field
from mlx_linearard.results.rows import Results
from mlx_linearard.results.store import ItemLog, update_results

ITEMS = [
    {"query": f"Question {i}:", "choices": ["the best of times", "the worst", f"number {i}"], "gold": i % 3}
    for i in range(6)
]


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return path


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("other") / "other", seed=5)


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line on standard error of a command that ends with status 2."""
    assert run_command(lambda: run(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_models_side_by_side(
    model_dir: Path, other_dir: Path, text_file: Path, items: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "results.json"
    out.write_text('{"native": {"kl": 0.0, "perplexity": {"64": 3.0}}, "kept": 1}')
    arguments = [
        "--model",
        f"restored={other_dir}",
        "--against",
        f"native={model_dir}",
        "--suite",
        "ppl,fidelity,choice",
        "--data",
        str(text_file),
        "--data",
        f"choice={items}",
        "--lengths",
        "60",
        "--tokens",
        "600",
        "--out",
        str(out),
    ]
    assert run(arguments) == 0
    printed = capsys.readouterr()
    assert (
        "choice/few acc" in printed.out and "ppl, restored" in printed.err and "restored" in printed.out.splitlines()[0]
    )
    results = json.loads(out.read_text())
    assert results["kept"] == 1 and results["native"]["perplexity"] == {"64": 3.0}  # what stood there stays
    assert results["restored"]["fidelity"]["metrics"]["kl"]["value"] > 0
    rows = results["comparisons"]["ppl"]["metrics"]["perplexity@60"]
    assert rows["restored"]["tests"][0]["b"] == "native" and rows["restored"]["percent_of_native"] > 0
    values = [results[name]["ppl"]["metrics"]["perplexity@60"]["value"] for name in ("restored", "native")]
    assert [rows[name]["value"] for name in ("restored", "native")] == values


def test_a_later_part_is_merged(model_dir: Path, text_file: Path, items: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    for suite in ("ppl", "choice"):
        data = f"choice={items}" if suite == "choice" else str(text_file)
        assert (
            run(
                [
                    "--model",
                    str(model_dir),
                    "--suite",
                    suite,
                    "--data",
                    data,
                    "--lengths",
                    "50",
                    "--tokens",
                    "100",
                    "--out",
                    str(out),
                ]
            )
            == 0
        )
    row = json.loads(out.read_text())["tiny"]
    assert set(row) == {"ppl", "choice/few"} and row["choice/few"]["metrics"]["acc"]["n"] == 6


def test_a_stopped_run_resumes(
    model_dir: Path, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    own, measured = Choice.measure, []

    def measure(self, subject, items, done, tick):
        for record in own(self, subject, items, done, tick):
            if len(measured) == 4:
                measured.append("stop")
                raise KeyboardInterrupt
            measured.append(record["id"])
            yield record

    monkeypatch.setattr(Choice, "measure", measure)
    out = tmp_path / "results.json"
    arguments = ["--model", str(model_dir), "--suite", "choice", "--data", str(items), "--out", str(out)]
    assert run_command(lambda: run(arguments)) == 130
    assert "resumes from them" in capsys.readouterr().err and not out.exists()
    log = next((tmp_path / "results.items").iterdir())
    log.write_text(log.read_text() + '{"id": "4", "samp')  # cut while it was written
    assert run(arguments) == 0
    assert measured == ["0", "1", "2", "3", "stop", "4", "5"]
    whole = json.loads(out.read_text())["tiny"]["choice/few"]["metrics"]
    shutil.rmtree(tmp_path / "results.items")
    assert run(arguments) == 0
    assert json.loads(out.read_text())["tiny"]["choice/few"]["metrics"] == whole
    assert len(measured) == 13
    assert run([*arguments, "--limit", "3"]) == 0 and len(measured) == 16  # other options, another log


def test_a_log_is_written_line_by_line(tmp_path: Path) -> None:
    log = ItemLog.beside(tmp_path / "r.json", "a/b c", "choice/x", "123")
    assert log.path == tmp_path / "r.items" / "a_b_c-choice_x-123.jsonl" and log.read() == {}
    for i in range(3):
        log.append({"id": str(i), "samples": {"acc": i}})
        assert list(log.read()) == [str(n) for n in range(i + 1)]


def test_a_suite_is_replaced_and_everything_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "results.json"

    def results(value: dict[str, Any]) -> Results:
        return Results.from_json(value, Field("new"))

    one = {"value": 1, "stderr": None}
    first = results({"a": {"ppl": {"metrics": {"x": one}, "grid": {"64": {"0": 1}}}, "kl": 2}})
    second = results({"a": {"ppl": {"metrics": {"y": one}}}, "b": {}})
    update_results(path, lambda old: old.merged(first))
    merged = update_results(path, lambda old: old.merged(second))
    kept = {"a": {"ppl": {"metrics": {"y": one}}, "kl": 2}, "b": {}}
    assert merged.as_json() == json.loads(path.read_text()) == kept


def test_a_finished_run_is_evaluated_into_its_own_results(
    model_dir: Path, other_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(other_dir, root / "model")
    shutil.copytree(other_dir, root / "base")
    (root / "config.yaml").write_text(f"model: {model_dir}\n")
    assert (
        run(
            [
                "--run",
                str(root),
                "--suite",
                "fidelity",
                "--data",
                str(text_file),
                "--lengths",
                "50,100",
                "--tokens",
                "200",
            ]
        )
        == 0
    )
    results = json.loads((root / "results.json").read_text())
    assert {"native", "scaled", "restored", "comparisons"} <= set(results)
    assert results["native"]["fidelity"]["metrics"]["kl"]["value"] == 0
    assert results["comparisons"]["fidelity"]["metrics"]["kl"]["restored"]["recovered"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--suite", "ppl"], "suite ppl needs text: give --data FILE"),
        (["--suite", "choice"], "suite choice needs items"),
        (["--suite", "lambada"], "suite lambada needs passages"),
        (["--suite", "choice", "--data", "choice=/nowhere.jsonl"], "/nowhere.jsonl does not exist"),
        (["--suite", "ppl", "--data", "/nowhere.txt"], "/nowhere.txt does not exist"),
        (["--suite", "mmlu"], "there is no such suite; choose from ppl"),
        (["--suite", "fidelity", "--data", "TEXT"], "fidelity needs a reference"),
        (["--suite", "ppl", "--data", "TEXT", "--lengths", "4000"], "--lengths 4000 does not fit the longest window"),
        (["--suite", "ppl", "--data", "TEXT", "--lengths", "x"], "--lengths x: must be whole numbers"),
        (["--suite", "ruler", "--data", "TEXT", "--tasks", "niah"], "--tasks niah: there is no such task"),
        (["--suite", "ruler", "--data", "TEXT", "--tasks", "qa_1"], "task qa_1 needs questions"),
        (["--suite", "ruler", "--data", "TEXT", "--data", "qa_1=a.jsonl"], "give both files"),
        (["--suite", "ppl", "--data", "TEXT", "--tokens", "0"], "--tokens: 0 is not a whole number from 1"),
        (["--suite", "ppl", "--data", "TEXT", "--run", "/nowhere"], "one of --model DIR and --run RUN"),
        (["--suite", "ppl", "--data", "TEXT", "--against", "/nowhere"], "/nowhere is not a model directory"),
    ],
)  # fmt: skip
def test_each_mistake_prints_one_line(
    model_dir: Path, text_file: Path, tmp_path: Path, more: list[str], says: str, capsys
) -> None:
    out = tmp_path / "results.json"
    given = [str(text_file) if part == "TEXT" else part for part in more]
    assert says in complaint(["--model", str(model_dir), "--out", str(out), *given], capsys)
    assert not list(tmp_path.iterdir())


def test_an_item_without_gold_and_broken_results_are_named(
    model_dir: Path, items: Path, tmp_path: Path, capsys
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(ITEMS[0]) + '\n{"query": "q", "choices": ["a", "b"]}\n')
    arguments = ["--model", str(model_dir), "--suite", "choice", "--out", str(tmp_path / "r.json"), "--data"]
    assert f"{bad} line 2 has no `gold`" in complaint([*arguments, str(bad)], capsys)
    bad.write_text("{")
    assert f"{bad} line 1 is not valid JSON" in complaint([*arguments, str(bad)], capsys)
    (tmp_path / "r.json").write_text("[]")
    assert "must be a JSON object" in complaint([*arguments, str(items)], capsys)
    assert (tmp_path / "r.json").read_text() == "[]"


def test_directories_with_different_tokenizers_are_not_compared(model_dir: Path, tmp_path: Path, capsys) -> None:
    other = shutil.copytree(model_dir, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = complaint(
        [
            "--model",
            str(model_dir),
            "--against",
            str(other),
            "--suite",
            "ppl",
            "--data",
            "x",
            "--out",
            str(tmp_path / "r.json"),
        ],
        capsys,
    )
    assert "have different tokenizers" in line and str(other) in line


def test_directories_of_one_name_must_be_named(model_dir: Path, capsys, tmp_path: Path) -> None:
    again = shutil.copytree(model_dir, tmp_path / "tiny")
    line = complaint(["--model", str(model_dir), "--against", str(again), "--suite", "ppl", "--data", "x"], capsys)
    assert "two directories are called tiny" in line
    line = complaint(["--model", f"export={again}", "--suite", "ppl", "--data", "x"], capsys)
    assert "cannot be called 'export'" in line


def test_sets_of_one_name_are_refused(model_dir: Path, items: Path, tmp_path: Path, capsys) -> None:
    data = [f"--data=choice={items}"] * 2
    line = complaint(["--model", str(model_dir), "--suite", "choice", *data, "--out", str(tmp_path / "r.json")], capsys)
    assert "two sets of data are called choice/few" in line


# ---------------------------------------------------------------------------------------------------
# Named sets from the hub, with the library's loader replaced by rows laid out as each set lays them out

ROWS = {
    "hellaswag": ({"activity_label": "Cooking", "ctx_a": "A man [header] stirs.", "ctx_b": "he",
                   "endings": ["eats [title] it", "b", "c", "d"], "label": "2"},
                  {"query": "Cooking: A man stirs. He", "choices": ["eats. it", "b", "c", "d"], "gold": 2}),
    "piqa": ({"goal": "Open it.", "sol1": "a", "sol2": "b", "label": 1},
             {"query": "Question: Open it.\nAnswer:", "choices": ["a", "b"], "gold": 1}),
    "arc_easy": ({"question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
                 {"query": "Question: Why?\nAnswer:", "choices": ["a", "b"], "gold": 1}),
    "openbookqa": ({"question_stem": "The sun", "choices": {"text": ["a", "b"], "label": ["A", "B"]},
                    "answerKey": "A"}, {"query": "The sun", "choices": ["a", "b"], "gold": 0}),
    "boolq": ({"passage": "P", "question": "is it", "answer": True},
              {"query": "P\nQuestion: is it?\nAnswer:", "choices": ["no", "yes"], "gold": 1}),
    "siqa": ({"context": "C", "question": "Q?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
             {"query": "Q: C Q?\nA:", "choices": ["a", "b", "c"], "gold": 2}),
    "mmlu": ({"question": " Q? ", "choices": ["w", "x", "y", "z"], "answer": 3},
             {"query": "Q?\nA. w\nB. x\nC. y\nD. z\nAnswer:", "choices": ["A", "B", "C", "D"], "gold": 3}),
    "mathqa": ({"Problem": "2 + 2?", "options": "a ) 1 , b ) 4 , c ) 5 , d ) 6 , e ) none", "correct": "b"},
               {"query": "Question: 2 + 2?\nAnswer:", "choices": ["1", "4", "5", "6", "none"], "gold": 1}),
    "lambada": ({"text": "the end"}, {"text": "the end"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_named_sets_become_items(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, item = ROWS[name]
    loaded = []

    def load_dataset(*where, split):
        loaded.append((*where, split))
        return [row, row]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert hub.load_set(name, 1) == [item] and len(hub.load_set(name)) == 2
    where = hub.SETS[name]
    assert loaded[0] == (where.repository, where.config, where.split)


def test_hub_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="hf:piq is not a known set"):
        hub.load_set("piq")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the extra `datasets`"):
        hub.load_set("piqa")

    def offline(*where, split):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    with pytest.raises(UserError, match=r"cannot be loaded from .*: no network"):
        hub.load_set("piqa")
    rows = types.SimpleNamespace(load_dataset=lambda *where, split: [{"other": 1}])
    monkeypatch.setitem(sys.modules, "datasets", rows)
    with pytest.raises(UserError, match="does not have the expected columns"):
        hub.load_set("piqa")


def test_rows_are_cut_as_the_harness_cuts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The description of a subject, the spaces that stay, and options that contain commas."""
    mmlu = hub.SETS["mmlu"].item(
        {"question": "Q?", "choices": list("wxyz"), "answer": 0, "subject": "high_school_physics"}
    )
    about = "The following are multiple choice questions (with answers) about high school physics."
    assert mmlu["query"] == f"{about}\n\nQ?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    row = {
        "activity_label": "Baking",
        "ctx_a": "[header] How to bake [title] Mix. [step]",
        "ctx_b": "",
        "label": "0",
        "endings": [" it  is [substeps] done. ", "b", "c", "d"],
    }
    swag = hub.SETS["hellaswag"].item(row)
    assert swag["query"] == "Baking: How to bake. Mix. " and swag["choices"][0] == "it is done."
    options = {
        "a ) rs . 1 , 500 , b ) 2 , c ) 3 , d ) 4 , e ) rs . 5 , 000": ["rs . 1", "2", "3", "4", "rs . 5 , 000"],
        "a)1, b)2, c)3, d)4, e)5": ["1", "2", "3", "4", "5"],
    }
    for text, choices in options.items():
        item = hub.SETS["mathqa"].item({"Problem": "P", "options": text, "correct": "e"})
        assert item == {"query": "Question: P\nAnswer:", "choices": choices, "gold": 4}


def test_a_set_that_is_a_script_is_read_from_its_converted_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*where, split, revision=None):
        asked.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found math_qa.py")
        return [ROWS["mathqa"][0]]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert hub.load_set("mathqa") == [ROWS["mathqa"][1]] and asked == [None, "refs/convert/parquet"]


def test_a_wrong_number_is_named(model_dir: Path, text_file: Path, tmp_path: Path, capsys) -> None:
    arguments = [
        "--model",
        str(model_dir),
        "--suite",
        "ppl",
        "--data",
        str(text_file),
        "--out",
        str(tmp_path / "r.json"),
    ]
    assert "--lengths 6²: must be whole numbers" in complaint([*arguments, "--lengths", "6²"], capsys)
    assert "x= names no directory" in complaint([*arguments, "--against", "x="], capsys)


def test_the_report_of_a_run_follows_its_evaluation(
    model_dir: Path, other_dir: Path, text_file: Path, tmp_path: Path, capsys
) -> None:
    root = tmp_path / "run"
    for name in ("model", "base"):
        shutil.copytree(other_dir, root / name)
    (root / "config.yaml").write_text(f"model: {model_dir}\n")
    row = {"perplexity": {"32": 9.0}, "agreement": 0.5}
    rows = {name: {**row, "kl": kl} for name, kl in (("native", 0.0), ("scaled", 1.0), ("restored", 0.1))}
    (root / "results.json").write_text(json.dumps(rows))
    assert (
        run(["--run", str(root), "--suite", "ppl", "--data", str(text_file), "--lengths", "64", "--tokens", "64"]) == 0
    )
    printed = capsys.readouterr().out
    assert "Short text is restored" in printed and f"The report is {root / 'report.html'}" in printed
    assert "Perplexity on the evaluation text" in (root / "report.html").read_text()
