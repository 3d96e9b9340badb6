"""The report: its verdict follows from the numbers, its text from the run is escaped, and it needs no other file."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_models
import pytest
from run_files import Page, a_comparison, a_row, a_run, held_out

from mlx_linearard.cli import run_command, runnable, shell_command
from mlx_linearard.config import OBJECTIVES, DistillConfig
from mlx_linearard.distill.listener import Listener
from mlx_linearard.distill.run import distill
from mlx_linearard.errors import UserError
from mlx_linearard.report.__main__ import run as command
from mlx_linearard.report.charts import Series, heat_map, line_chart, linear_axis, log_axis, number, tokens
from mlx_linearard.report.content import notes
from mlx_linearard.report.figures import figures
from mlx_linearard.report.load import read_run
from mlx_linearard.report.render import write_report
from mlx_linearard.results.next_steps import next_steps
from mlx_linearard.results.verdict import headline, verdict
from mlx_linearard.rope import scale_rope


def test_the_page_names_the_long_part(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    assert "long text: " not in write_report(run).read_text()
    with (run / "config.yaml").open("a") as file:
        file.write("long_weight: 0.2\nlong_objective: ce+recall\nlong_seq_len: 16384\n")
    assert "long text: 0.2 × ce+recall on blocks of 16384 tokens" in write_report(run).read_text()


def test_the_page_needs_no_other_file_and_shows_everything(tmp_path: Path) -> None:
    path = write_report(a_run(tmp_path / "run"))
    text = path.read_text()
    page = Page(text)
    assert path == tmp_path / "run" / "report.html"
    assert page.links == ["data:,"]  # an icon of no bytes, so that a browser does not ask for one
    assert not re.search(r"url\(|@import|https?:", text) and "script" not in page.tags
    assert page.tags.count("svg") == 6  # loss, length, position, two pass keys, memory
    for part in (
        "Short text is restored",
        "Multiple choice: piqa",
        "0.500 ± 0.1",
        "96%",
        "88%",
        "inside the noise",
        "Pass key found, restored",
        "8192 → 32768 tokens",
        "a <Mac>",
        "mlx 0.32.4",
        "12 min",
        "1 179 648",
    ):
        assert part in page.text, part
    for need in ("prefers-color-scheme:dark", "@media print", "width=device-width"):
        assert need in text


def test_the_page_of_a_comparison_shows_all_objectives(tmp_path: Path) -> None:
    path = write_report(a_comparison(tmp_path / "out"))
    text, page = path.read_text(), Page(path.read_text())
    assert page.links == ["data:,"] and not re.search(r"url\(|@import|https?:", text)
    for part in (
        "The objective logits won back most of what scaling cost, 82%",
        "objectives: relation, logits",
        "Against logits",
        "the best",
        "worse, p < 0.001",
        "Peak memory",
        "5 min and 0.80 GB",
        *(f"Training loss, {name}, nats" for name in OBJECTIVES),
    ):
        assert part in page.text, part
    for style in ("one", "two", "three", "four"):
        assert f'class="line {style}"' in text and f'<tr class="{style}">' in text
    assert "<th scope=row>restored</th>" not in text  # the first objective's second name


def test_text_from_a_run_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    root = a_run(tmp_path / "run", **{evil: {"perplexity": {"64": 3.0}, evil: {"metrics": {evil: {"value": 1.0}}}}})
    (root / "config.yaml").write_text(f'model: "x/y"\n"{evil}": "{evil}|`"\n')
    text = write_report(root).read_text()
    assert "script" not in Page(text).tags and "&lt;script&gt;" in text
    twin = (root / "report.md").read_text()
    assert "<script>" not in twin and "&lt;script&gt;" in twin and "\\|\\`" in twin


def test_the_markdown_twin_has_the_same_tables(tmp_path: Path) -> None:
    root = a_run(tmp_path / "run")
    write_report(root)
    twin = (root / "report.md").read_text()
    assert "| restored | 34.20 | 31.20 | 0.1530 | 80.0% | 91% |" in twin
    assert "Short text is restored: training won back 91% of what scaling cost" in twin
    widths: dict[str, set[int]] = {}
    heading = ""
    for line in twin.splitlines():
        heading = line if line.startswith("#") else heading
        if line.startswith("|"):
            widths.setdefault(heading, set()).add(len(re.findall(r"(?<!\\)\|", line)))
    assert len(widths) >= 6 and all(len(found) == 1 for found in widths.values())


@pytest.mark.parametrize(
    ("scaled", "restored", "says"),
    [
        (a_row(1.7, 164.3), a_row(0.153, 34.2), "Short text is restored: training won back 91%"),
        (a_row(1.7, 164.3), a_row(0.85, 60.0), "Short text is restored in part: training won back 50%"),
        (a_row(1.7, 164.3), a_row(1.6, 150.0), "Training helped little: it won back 6%"),
        (a_row(1.7, 164.3), a_row(1.9, 170.0), "Training did not help: the simple scaled model is at least as good"),
        (a_row(0.004, 31.0), a_row(0.002, 31.0), "already as good as the native one, so training was not needed"),
        (a_row(1.7, 164.3, 174.0), a_row(0.1, 33.0, 31.2), "perplexity is 31.20 at 16384 tokens, against 30.90 native"),
        (a_row(1.7, 164.3), a_row(0.1, 33.0), "Whether the long window is used was not measured."),
    ],
)
def test_the_verdict_follows_from_the_numbers(
    tmp_path: Path, scaled: dict[str, Any], restored: dict[str, Any], says: str
) -> None:
    sentences = verdict(read_run(a_run(tmp_path / "run", scaled=scaled, restored=restored)))
    assert says in " ".join(sentences) and len(sentences) == 2


def test_a_failed_export_is_said_first(tmp_path: Path) -> None:
    """Results and report are written whatever the verification of the export finds."""
    bad = {"kl": 0.15, "max_difference": 46.0, "tokens": 64, "tolerance": 0.01, "unstable": ["the export"]}
    for export, part in (
        (bad, "is 0.15 nats per token, at most 0.01 is allowed; the export gave different logits when computed again"),
        ({**bad, "kl": None, "unstable": []}, "is not a finite number, at most 0.01 is allowed. Export again"),
    ):
        root = a_run(tmp_path / "run", export=export)
        first = notes(read_run(root))[0].text
        assert first.startswith("The exported model does not compute what was trained") and part in first
        write_report(root)
        assert part in Page((root / "report.html").read_text()).text
    (root / "results.json").write_text(json.dumps({"native": a_row(0.0, 30.9), "export": bad}))
    assert "does not compute" in notes(read_run(root))[0].text
    assert not any("does not compute" in note.text for note in notes(read_run(a_run(tmp_path / "good"))))


def test_missing_parts_are_left_out(tmp_path: Path) -> None:
    root = a_run(tmp_path / "run")
    (root / "results.json").unlink()
    text = write_report(root).read_text()
    assert "no verdict yet" in text and Page(text).tags.count("svg") == 2
    (root / "before.json").write_text(json.dumps({"native": a_row(0.0, 30.9), "scaled": a_row(1.7, 164.3)}))
    assert "164.30" in write_report(root).read_text()
    (root / "metrics.jsonl").write_text((root / "metrics.jsonl").read_text() + '{"step": 31, "lo')
    (root / "config.yaml").unlink()
    assert Page(write_report(root).read_text()).tags.count("svg") == 2


def test_a_run_under_way_has_a_report_on_request(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    root, found = tmp_path / "run", []

    class Reader(Listener):
        def step(self, record: Any, total: int) -> None:
            assert command([str(root)]) == 0
            found.append(((root / "report.md").read_text(), Page((root / "report.html").read_text())))

    distill(
        DistillConfig(
            model=str(model_dir),
            data=str(text_file),
            output=str(root),
            seq_len=32,
            grad_accum=1,
            steps=3,
            lora_rank=4,
            eval_tokens=64,
        ),
        Reader(),
    )
    assert len(found) == 3
    assert [f"at step {n};" in twin for n, (twin, _) in enumerate(found, 1)] == [True] * 3
    for twin, page in found:
        assert "no verdict yet" in twin and "| scaled |" in twin and "| restored |" not in twin
        assert page.tags.count("svg") == (2 if "at step 1;" not in twin else 0)  # one point is no curve
    assert "| restored |" in (root / "report.md").read_text()


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("results.json", "{", "results.json is not valid JSON"),
        ("results.json", "[]", "must be a JSON object, not a list"),
        ("results.json", '{"native": 3}', "native must be a JSON object"),
        ("results.json", '{"native": {"kl": "low"}}', "native.kl must be a finite number, not 'low'"),
        ("results.json", '{"native": {"kl": NaN}}', "NaN is not a JSON number"),
        ("results.json", '{"native": {"kl": true}}', "native.kl must be a finite number, not True"),
        ("results.json", '{"native": {"perplexity": {"x": 1}}}', "perplexity has the key 'x', which is not a length"),
        ("results.json", '{"native": {"ppl": {"metrics": {"a": {}}}}}', "native.ppl.a must be a finite number"),
        ("results.json", '{"native": {"passkey": {"metrics": {}, "grid": [1]}}}', "grid must be a JSON object"),
        ("results.json", '{"comparisons": {"a": {"metrics": {"b": {"c": {"tests": [1]}}}}}}', "paired tests"),
        ("metrics.jsonl", '{"step": 1}\n', "line 1 is not a valid step record"),
        ("config.yaml", "a: [", "config.yaml is not valid YAML"),
    ],
)
def test_broken_parts_are_named_in_one_line(tmp_path: Path, file: str, text: str, says: str, capsys) -> None:
    root = a_run(tmp_path / "run")
    (root / file).write_text(text)
    assert run_command(lambda: command([str(root)])) == 2
    line = capsys.readouterr().err
    assert says in line and line.count("\n") == 1 and file in line
    assert not (root / "report.html").exists()


def test_a_place_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)


# ---------------------------------------------------------------------------------------------------
# What the suites say against a good KL


def measured(value: float, **more: float) -> dict[str, Any]:
    return {"value": value, "stderr": 0.02, "n": 39, **more}


def a_test(other: str, outcome: str) -> dict[str, Any]:
    return {"a": "restored", "b": other, "p": 0.0004, "outcome": outcome}


def with_ruler(
    root: Path, native: float, restored: float, outcome: str = "worse", *, length: int = 4096, **more: Any
) -> Path:
    """A run whose KL is restored, with RULER of native and restored at a length."""
    metric = f"average@{length}"
    rows = {"native": a_row(0.0, 30.9), "scaled": a_row(1.7, 164.3), "restored": a_row(0.138, 30.9)}
    rows["native"]["ruler"] = {"metrics": {metric: measured(native), "vt@4096": measured(1.0)}}
    rows["restored"]["ruler"] = {"metrics": {metric: measured(restored)}}
    tests = {"restored": {**measured(restored), "tests": [a_test("native", outcome)]}}
    return a_run(root, comparisons={"ruler": {"metrics": {metric: tests}}}, **{**rows, **more})


def test_a_model_that_lost_copying_is_not_called_restored(tmp_path: Path) -> None:
    """The recipe of the README: KL and perplexity come back, RULER falls from 30.3 to 0."""
    facts = read_run(with_ruler(tmp_path / "run", 30.3, 0.0))
    first, second = verdict(facts)
    assert first.startswith(
        "Short text is restored in part: training won back 92% of what scaling cost in predicting the next token"
    )
    assert "not restored: RULER at 4096 tokens: 0.0% against 30.3% native" in first
    assert "Short text is restored:" not in first + second
    assert facts.root == tmp_path / "run"
    assert not any("Finding a detail in a long text" in note.text for note in notes(facts))
    write_report(facts.root)
    assert "RULER at 4096 tokens: 0.0%" in Page((facts.root / "report.html").read_text()).text


@pytest.mark.parametrize(
    ("native", "restored", "outcome", "sure"),
    [
        (30.3, 29.0, "inside the noise", None),
        (30.3, 20.0, "inside the noise", False),
        (0.0, 0.0, "equal", None),
        (30.3, 0.0, "too few samples", False),
        (30.3, 20.0, "worse", True),
        (30.3, 40.0, "better", None),
    ],
)
def test_only_what_cannot_be_chance_is_called_lost(
    tmp_path: Path, native: float, restored: float, outcome: str, sure: bool | None
) -> None:
    facts = read_run(with_ruler(tmp_path / "run", native, restored, outcome))
    assert ("not restored: RULER" in verdict(facts)[0]) == (sure is True)
    assert any("too few samples to rule out chance: RULER" in note.text for note in notes(facts)) == (sure is False)
    assert ("Short text is restored: training won back 92%" in verdict(facts)[0]) == (sure is not True)


def test_beyond_the_native_window_native_inside_it_is_the_measure(tmp_path: Path) -> None:
    metrics = {
        "native": {"accuracy@8192": measured(0.9), "accuracy@16384": measured(0.0)},
        "restored": {"accuracy@8192": measured(0.88), "accuracy@16384": measured(0.1)},
    }
    rows = {
        name: a_row(kl, 30.9, passkey={"metrics": metrics[name]}) for name, kl in (("native", 0.0), ("restored", 0.1))
    }
    facts = read_run(a_run(tmp_path / "run", **rows))
    short, long = verdict(facts)
    assert long == "The long window is not used: the pass key at 16384 tokens: 10% against 90% native at 8192."
    assert "8192 tokens: 88%" not in short and "16384" not in short and short.startswith("Short text is restored:")


def test_a_suite_that_was_not_measured_is_named_with_its_command(tmp_path: Path) -> None:
    root = a_run(tmp_path / "a run", native=a_row(0.0, 30.9), restored=a_row(0.1, 31.0))
    facts = read_run(root)
    assert "of what scaling cost in predicting the next token" in verdict(facts)[0]
    commands = {str(note.command).split("--suite ")[-1] for note in notes(facts)}
    assert commands >= {
        "passkey,ruler --data TEXT",
        "choice,lambada --data choice=hf:hellaswag --data lambada=hf:lambada",
    }
    compare = "config.yaml' --objective logits --compare relation,logits"
    assert any(compare in str(note.command) for note in notes(facts))
    write_report(root)
    page, twin = (root / "report.html").read_text(), (root / "report.md").read_text()
    assert f"--run &#39;{root}&#39; --suite passkey,ruler" in page and f"--run '{root}' --suite passkey" in twin
    full = read_run(a_run(tmp_path / "full"))
    assert not any("--suite" in str(note.command) and "choice" in str(note.command) for note in notes(full))
    beyond = [note.text for note in notes(full) if "--lengths 16384" in str(note.command)]
    assert beyond == ["Finding a detail beyond the native window of 8192 tokens was not measured."]


def test_a_note_says_what_scaling_alone_does_as_well(tmp_path: Path) -> None:
    def rows(scaled: str) -> dict[str, Any]:
        lost = a_test("native", "worse")
        tests = {
            "scaled": {**measured(0.4), "tests": [lost]},
            "restored": {**measured(0.41), "tests": [lost, a_test("scaled", scaled)]},
        }
        return {"choice/piqa": {"metrics": {"acc_norm": tests}}}

    for outcome, said in (("inside the noise", True), ("worse", True), ("better", False)):
        facts = read_run(a_run(tmp_path / "run", comparisons=rows(outcome)))
        told = [note.text for note in notes(facts) if "no better than the simple scaled model" in note.text]
        assert told == (["Restored is no better than the simple scaled model in multiple choice piqa."] if said else [])


def test_the_runs_own_numbers_have_their_uncertainty(tmp_path: Path) -> None:
    root = a_run(tmp_path / "run")
    (root / "held_out.json").write_text(json.dumps(held_out({"native": 0.0, "scaled": 1.7, "restored": 0.153}, 0.1)))
    write_report(root)
    twin = (root / "report.md").read_text()
    assert re.search(r"\| 0\.1530 ± 0\.01\d* \|", twin)
    assert "KL of restored: better than scaled, p &lt; 0.001" in twin
    (root / "held_out.json").write_text(json.dumps(held_out({"native": 0.0, "scaled": 1.7, "restored": 1.69}, 0.5)))
    rows = {"scaled": a_row(1.7, 164.3), "restored": a_row(1.69, 160.0)}
    noisy = a_run(tmp_path / "run", **rows)
    assert "made no difference to the simple scaled model beyond chance" in verdict(read_run(noisy))[0]


def test_perplexity_by_position_needs_no_evaluation(tmp_path: Path) -> None:
    root = a_run(tmp_path / "run", native=a_row(0.0, 30.9), restored=a_row(0.153, 34.2))
    (root / "held_out.json").write_text(json.dumps(held_out({"native": 0.0, "scaled": 1.7, "restored": 0.153}, 0.1)))
    figure = next(f for f in figures(read_run(root)) if f.title == "Perplexity by position")
    assert figure.data and list(figure.data.heads) == ["", "64", "128", "256", "512"]
    expected = [math.exp(4.0), math.exp(3.9), math.exp(3.75), math.exp(3.45)]
    assert [float(cell) for cell in figure.data.rows[0][1:]] == pytest.approx(expected, abs=0.005)
    assert [row[0] for row in figure.data.rows] == ["native", "scaled", "restored"]
    for broken, says in (
        ({"native": {"kl": {"x": 1.0}}}, "'x' instead of LENGTH/WINDOW/PIECE"),
        ([], "JSON object"),
        ({"native": {"kl": {"1/1/1": None}}}, "must be a finite number"),
    ):
        (root / "held_out.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=says):
            read_run(root)


def test_a_comparison_says_what_an_objective_did_not_restore(tmp_path: Path) -> None:
    root = a_comparison(tmp_path / "out")
    results = json.loads((root / "results.json").read_text())
    metrics = {"average@4096": measured(30.0)}
    results["native"]["ruler"] = {"metrics": metrics}
    for name, value in (("relation", 0.0), ("logits", 29.0)):
        results[name]["ruler"] = {"metrics": {"average@4096": measured(value)}}
    (root / "results.json").write_text(json.dumps(results))
    text = " ".join(headline(read_run(root)))
    assert "Not restored: with relation, RULER at 4096 tokens: 0.0%" in text and "with logits, RULER" not in text
    write_report(root)
    page = Page((root / "report.html").read_text()).text
    assert "won back most" in page and "Training took" in page and "--suite choice,lambada" in page


def far(gain: float, stderr: float | None = 0.02) -> dict[str, Any]:
    """The suite `far` at 16384 tokens; the gain grows towards the end of the text."""
    parts = [
        {"start": start, "end": start + 100, "gain": gain * (start - 5384) / 10000, "stderr": stderr}
        for start in range(15384, 16384, 100)
    ]
    value = {"value": gain, "stderr": stderr, "n": 32 if stderr else 1}
    return {"metrics": {"gain@16384": value}, "gain_by_position": {"16384": parts}}


def test_the_gain_from_far_text_has_a_picture_a_table_and_a_sentence(tmp_path: Path) -> None:
    rows = {"scaled": a_row(1.7, 164.3, far=far(-0.1)), "restored": a_row(0.1, 31.0, far=far(0.2))}
    root = a_run(tmp_path / "run", **rows)
    figure = next(f for f in figures(read_run(root)) if f.title.startswith("Gain from far text"))
    picture = ET.fromstring(figure.svg)
    bands = [e for e in picture.iter() if "band" in e.get("class", "")]
    assert [e.get("class") for e in bands] == ["band scaled", "band restored"]
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", bands[1].get("d", ""))]
    line = next(e.get("d", "") for e in picture.iter() if e.get("class") == "line restored")
    middle = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", line)]
    assert len(heights) == 20 and all(a < b < c for a, b, c in zip(heights[:10], middle, heights[:9:-1], strict=True))
    assert figure.data and figure.data.rows[1][:2] == ["restored", "0.200 ± 0.02"]
    text = Page(write_report(root).read_text()).text
    for part in ("The long window is used: text beyond the old window helps", "gain@16384", "0.200 ± 0.02"):
        assert part in text, part
    one = read_run(a_run(tmp_path / "one", restored=a_row(0.1, 31.0, far=far(0.2, None))))
    svg = next(f.svg for f in figures(one) if f.title.startswith("Gain from far text"))
    assert "band" not in svg and "line restored" in svg


@pytest.mark.parametrize(
    ("gain", "kl", "colour"), [(0.2, 0.1, "good"), (-0.2, 0.1, "partly"), (0.2, 2.0, "bad"), (None, 0.1, "unknown")]
)
def test_the_box_has_the_colour_of_the_verdict(tmp_path: Path, gain: float | None, kl: float, colour: str) -> None:
    suites = {} if gain is None else {"far": far(gain)}
    text = write_report(a_run(tmp_path / "run", restored=a_row(kl, 31.0, **suites))).read_text()
    assert re.findall(r'class="verdict (\w+)"', text) == [colour] and f".{colour} {{ --mood" in text


def test_what_to_do_next_is_what_the_run_says(tmp_path: Path) -> None:
    """The same commands as at the end of a run; each once, though a note would give it too."""
    root = a_run(tmp_path / "run", native=a_row(0.0, 30.9), restored=a_row(0.1, 31.0))
    write_report(root)
    page, twin = Page((root / "report.html").read_text()).text, (root / "report.md").read_text()
    facts = read_run(root)
    for step in next_steps(facts, root):
        for words in step.commands:
            line = shell_command(*runnable(words))
            assert page.count(line) == twin.count(line) == 1
    assert "--suite far" in page


@pytest.mark.parametrize(
    ("kind", "scaling", "advised"),
    [("llama", None, True), ("qwen3_moe", None, False), ("llama", {"rope_type": "linear", "factor": 2.0}, False)],
)
def test_yarn_is_advised_only_if_the_model_takes_it(
    tmp_path: Path, kind: str, scaling: dict[str, Any] | None, advised: bool
) -> None:
    root = a_run(tmp_path / "run", run={"method": "ntk", "native_window": 32})
    (root / "base").mkdir()
    config = family_models.config(kind, rope_scaling=scaling)
    (root / "base" / "config.json").write_text(json.dumps(scale_rope(config, "ntk", 4.0)))
    restored = a_row(1.5, 40.0)
    results = json.loads((root / "results.json").read_text())
    (root / "results.json").write_text(json.dumps({**results, "restored": restored}))
    told = [step.text for step in next_steps(read_run(root), root)]
    assert any("YaRN" in text for text in told) == advised


@pytest.mark.parametrize(("rate", "advised"), [(None, "1.5e-4"), (1e-4, "3.3e-5"), (3e-4, "1e-4"), (9.0, "1.5e-4")])
def test_a_run_that_became_worse_is_advised_a_third_of_its_rate(
    tmp_path: Path, rate: float | None, advised: str
) -> None:
    root = a_run(tmp_path / "run", run={"steps": 28, "exported_step": 0, "method": "yarn"}, restored=a_row(1.7, 40.0))
    (root / "config.yaml").write_text("factor: 4.0\n" if rate is None else f"learning_rate: {rate:.6f}\n")
    commands = [" ".join(map(str, words)) for step in next_steps(read_run(root), root) for words in step.commands]
    assert any(f"--learning-rate {advised} --output" in line for line in commands), commands


def test_what_each_model_writes_is_shown_as_it_is(tmp_path: Path) -> None:
    def wrote(text: str, prompt: str = "Once <b>upon</b> a time") -> dict[str, Any]:
        return {"prompt": prompt, "text": text}

    rows = {
        "native": a_row(0.0, 30.9, sample=wrote("there was <script>alert(1)</script>\n\n# a king")),
        "scaled": a_row(1.7, 164.3, sample=wrote("x")),
        "restored": a_row(0.1, 31.0, sample=wrote("y", "another prompt")),
    }
    root = a_run(tmp_path / "run", **rows)
    page = Page(write_report(root).read_text())
    assert "script" not in page.tags and "there was <script>alert(1)</script>" in page.text
    assert "Once <b>upon</b> a time" in page.text and "another prompt" not in page.text
    twin = (root / "report.md").read_text()
    assert "<script>" not in twin and "- native: there was &lt;script&gt;alert(1)&lt;/script&gt; \\# a king" in twin
    (root / "results.json").write_text(json.dumps({"native": {"kl": 0.0, "sample": {"prompt": 3, "text": "x"}}}))
    with pytest.raises(UserError, match=r"native\.sample\.prompt must be a string"):
        read_run(root)


# ---------------------------------------------------------------------------------------------------
# Charts


@pytest.mark.parametrize("values", [[0.3, 7.2], [5.0, 5.0], [0.0, 0.0], [-3.0, 1e6], [1e-5, 2e-5]])
def test_a_linear_axis_encloses_its_values_with_round_ticks(values: list[float]) -> None:
    axis = linear_axis(values)
    assert axis.low <= min(values) and axis.high >= max(values) and 2 <= len(axis.ticks) <= 9
    steps = {
        round((b - a) / (axis.ticks[1] - axis.ticks[0]), 6) for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)
    }
    assert steps == {1.0}
    assert axis.place(axis.low, 10, 90) == 10 and axis.place(axis.high, 10, 90) == 90


@pytest.mark.parametrize("values", [[30.0, 400.0], [1.0, 1.0], [0.02, 9000.0]])
def test_a_log_axis_encloses_its_values(values: list[float]) -> None:
    axis = log_axis(values)
    assert axis.low <= min(values) * 1.001 and axis.high >= max(values) * 0.999 and axis.low < axis.high
    assert 2 <= len(axis.ticks) <= 9
    middle = (axis.low * axis.high) ** 0.5
    assert axis.place(middle, 0, 100) == pytest.approx(50)


def test_lines_are_drawn_where_the_numbers_are() -> None:
    axis = linear_axis([0.0, 10.0])
    text = line_chart([Series("a & b", "native", [(0, 0), (10, 10)])], axis, axis, x_label="<x>", y_label="y")
    root = ET.fromstring(text)
    path = next(e for e in root.iter() if "line native" in e.get("class", ""))
    start, end = re.findall(r"[ML]([\d.]+) ([\d.]+)", path.get("d", ""))
    assert float(start[0]) < float(end[0]) and float(start[1]) > float(end[1])
    assert next(e.text for e in root.iter("title")) == "a & b"


def test_a_heat_map_has_a_cell_for_each_number() -> None:
    root = ET.fromstring(heat_map({4096: {0: 1.0, 50: 0.25}, 8192: {0: 0.0}}, x_label="tokens", y_label="depth"))
    cells = [e.get("fill-opacity") for e in root.iter("rect") if e.get("class") == "cell"]
    assert cells == ["1.00", "0.00", "0.25"]


def test_labels_are_short() -> None:
    assert [tokens(n) for n in (64, 1024, 16384, 1500)] == ["64", "1K", "16K", "1 500"]
    assert [number(v) for v in (0, 0.05, 12.0, 2e6, 1e-5)] == ["0", "0.05", "12", "2·10⁶", "10⁻⁵"]


# ---------------------------------------------------------------------------------------------------
# In a browser


def opened(page: Path, profile: Path, *more: str) -> tuple[list[str], list[str]]:
    """(console messages, outside addresses the page asked for) of headless Chromium, cut off from every name."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    log = profile.with_suffix(".json")
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a BLAS is not for browsers
    found = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-sync",
            "--disable-background-networking",
            "--disable-component-update",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={profile}",
            f"--log-net-log={log}",
            "--enable-logging=stderr",
            "--v=0",
            *more,
            f"file://{page}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=plain,
    )
    assert found.returncode == 0, found.stderr
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # The browser's own requests belong to no page or to one of its own.
    asked = [e["url"] for e in events if "file://" in str(e.get("network_isolation_key")) and "url" in e]
    return [line for line in found.stderr.splitlines() if "CONSOLE" in line], asked


@pytest.mark.slow
@pytest.mark.parametrize("width", ["1200", "500"])
@pytest.mark.parametrize("scheme", ["0", "1"], ids=["dark", "light"])
@pytest.mark.parametrize("made", [a_run, a_comparison])
def test_a_browser_opens_it_without_a_message(
    tmp_path: Path, made: Callable[[Path], Path], width: str, scheme: str
) -> None:
    page = write_report(made(tmp_path / "run"))
    picture = tmp_path / "page.png"
    more = [f"--window-size={width},1600", f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}"]
    assert opened(page, tmp_path / "profile", *more) == ([], [])
    assert picture.stat().st_size > 20_000  # a blank page is a few thousand bytes


@pytest.mark.slow
def test_a_bad_page_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<!doctype html><img src="http://outside.example/x.png"><script>throw Error("bad")</script>')
    messages, asked = opened(page, tmp_path / "profile", f"--screenshot={tmp_path / 'x.png'}")
    assert any("bad" in line for line in messages) and asked == ["http://outside.example/x.png"]
