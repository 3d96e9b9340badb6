"""A report of files that somebody else wrote: nothing in them becomes markup, a link or a shell word of its own, and
nothing in them ends in a traceback."""

from __future__ import annotations

import copy
import json
import random
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_files import Page, a_comparison, a_row, a_run, held_out

from mlx_linearard.cli import path_word, run_command, shell_command
from mlx_linearard.report.__main__ import run as command
from mlx_linearard.report.charts import line_chart, linear_axis, log_axis, number
from mlx_linearard.report.content import notes
from mlx_linearard.report.load import read_run
from mlx_linearard.report.render import markdown_code, markdown_line, markdown_text, write_report

NAMES = [
    "a b",
    "it's",
    "r`<img src=x onerror=alert(1)>`",
    "x](javascript:alert(1))",
    "line\nbreak",
    "$(touch hacked)",
    "a;touch hacked #",
    "-x",
    "tab\tand \x1b[31mred",
    "\u202edm.txt",
    "|cell|",
    "# heading",
    "```\n# code",
    "uñicode 模型",
    b"not utf-8 \xff".decode("utf-8", "surrogateescape"),
]


def words_of(line: str) -> list[str]:
    """The words that bash makes of a command line, which it does not run."""
    script = f"set -f; for word in {line}; do printf '%s\\0' \"$word\"; done"
    raw = subprocess.run(["bash", "-c", script], check=True, capture_output=True).stdout
    return [word.decode("utf-8", "surrogateescape") for word in raw.split(b"\0")[:-1]]


@pytest.mark.parametrize("name", NAMES)
def test_a_shell_reads_the_words_of_a_command(name: str) -> None:
    line = shell_command("mlx_linearard.report", path_word(name), f"--x={name}", name)
    assert "\n" not in line and line.isprintable()
    assert words_of(line) == ["mlx_linearard.report", path_word(name), f"--x={name}", name]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_any_name_has_a_clean_report(tmp_path: Path, name: str) -> None:
    root = a_run(tmp_path / name, native=a_row(0.0, 30.9), restored=a_row(0.1, 31.0))
    (root / "config.yaml").write_text(json.dumps({"model": f"x/{name}" if name.isprintable() else "x", name[:9]: "y"}))
    for note in notes(read_run(root)):
        words = words_of(note.command or "")
        assert not words or str(root) in words or str(root / "config.yaml") in words
        assert not words or words[2 if words[1] == "-m" else 0].startswith("mlx_linearard.")
    page, twin = write_report(root).read_text(), (root / "report.md").read_text()
    tags = set(Page(page).tags)
    assert not tags & {"img", "script", "a"} and Page(page).links == ["data:,"]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page + twin)
    assert_plain_markdown(twin)
    assert not list(tmp_path.rglob("hacked"))


def assert_plain_markdown(twin: str) -> None:
    """No HTML, link, image or heading but the report's own, outside code spans."""
    outside = re.sub(r"(`+)(?:(?!`).|(?!\1)`+)*?\1(?!`)", "", re.sub(r"\\.", "", twin))
    assert not re.search(r"<|\]\(|!\[|`", outside), outside
    own = (
        r"# .*|## (What to .*|Text that each.*|Gain.*|Comparison|Objectives|Run|Configuration|Perplexity.*|"
        r"Training.*|Pass key.*|Multiple choice.*)"
    )
    lines = twin.splitlines()
    assert all(re.fullmatch(own, line) for line in lines if line.startswith("#")), lines
    assert sum(line.startswith("# ") for line in lines) == 1


@pytest.mark.parametrize(
    "objective", ["ce; curl http://127.0.0.1:9/x | sh #", "$(id)", "relation,logits", 3, ["ce"], None, "'\n", True]
)
def test_an_objective_of_the_file_is_no_part_of_a_command(tmp_path: Path, objective: Any) -> None:
    root = a_run(tmp_path / "run")
    (root / "config.yaml").write_text(json.dumps({"model": "m", "method": "linear", "objective": objective}))
    suggested = [note.command for note in notes(read_run(root)) if note.command and "--compare" in note.command]
    assert [shlex.split(line)[-4:] for line in suggested] == [["--compare", "logits,relation", "--output", "DIR"]]
    write_report(root)
    assert_plain_markdown((root / "report.md").read_text())


def test_models_and_suites_with_hostile_names(tmp_path: Path) -> None:
    for name in NAMES:
        if "\udcff" in name:
            continue  # no JSON text holds half of a surrogate pair
        suite = {"metrics": {name: {"value": 1.0}, f"{name}@4": {"value": 2}}}
        rows = {name: {**a_row(0.1, 3.0), name: suite, "passkey": {**suite, "grid": {"64": {"50": 0.5}}}}}
        test = {"b": name, "outcome": "worse", "words": name}
        tests = {"restored": {"value": 1.0, "tests": [test]}, name: {"value": 1.0, "tests": [test]}}
        root = a_run(tmp_path / "run", **rows, comparisons={name: {"metrics": {name: tests}}})
        page = Page(write_report(root).read_text())
        assert not set(page.tags) & {"img", "script", "a"}
        assert_plain_markdown((root / "report.md").read_text().replace(f"## {markdown_text(name)}", ""))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", "a\\|b"),
        ("[x](javascript:alert(1))", "\\[x\\](javascript:alert(1))"),
        ("![x](y)", "!\\[x\\](y)"),
        ("<b>&amp;</b>", "&lt;b&gt;&amp;amp;&lt;/b&gt;"),
        ("see https://x.y and WWW.x.y", "see https\\://x.y and WWW\\.x.y"),
        ("_www.x.y (http://z)", "\\_www\\.x.y (http\\://z)"),
        ("two\n\n# lines\r\u2028end", "two \\# lines end"),
        ("~~no~~ *no* _no_ $no$ `no`", "\\~\\~no\\~\\~ \\*no\\* \\_no\\_ \\$no\\$ \\`no\\`"),
        ("\x1b[1m\x00\u202e", "\ufffd\\[1m\ufffd\ufffd"),
        ("half \ud800", "half \ufffd"),
    ],
)
def test_text_is_escaped_for_markdown(text: str, shown: str) -> None:
    assert markdown_text(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("- a", "&#45; a"),
        ("+ a", "&#43; a"),
        ("1. a", "&#49;. a"),
        ("12) a", "&#49;2) a"),
        ("===", "&#61;=="),
        ("---", "&#45;--"),
        ("34.20 a", "34.20 a"),
        ("8192 → 1", "8192 → 1"),
        ("# a", "\\# a"),
        ("> a", "&gt; a"),
    ],
)
def test_a_line_begins_no_list_and_underlines_nothing(text: str, shown: str) -> None:
    assert markdown_line(text) == shown


@pytest.mark.parametrize(
    ("text", "span"), [("a b", "`a b`"), ("a`b", "``a`b``"), ("`a``b`", "``` `a``b` ```"), ("a\nb", "`a b`")]
)
def test_a_code_span_is_fenced_by_more_backticks_than_it_holds(text: str, span: str) -> None:
    assert markdown_code(text) == span


# ---------------------------------------------------------------------------------------------------
# Values that do not belong where they are

VALUES: list[Any] = [
    None,
    True,
    "x",
    "",
    [],
    [1],
    {},
    {"a": 1},
    -1,
    0,
    1e306,
    -1e306,
    1e-320,
    2**70,
    int("9" * 99),
    "9" * 5000,
    "٣",
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def replaced(whole: Any, path: tuple[Any, ...], value: Any, *, key: bool = False) -> Any:
    """A copy of a JSON value with another value, or another key, at a path."""
    if not path:
        return value
    changed = copy.deepcopy(whole)
    inner = changed
    for step in path[:-1]:
        inner = inner[step]
    if key and isinstance(inner, dict):
        inner[str(value)] = inner.pop(path[-1])
    else:
        inner[path[-1]] = value
    return changed


def complaint(root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says of a run: '' or one line that names a file of the run."""
    status = run_command(lambda: command([str(root)]))
    text = capsys.readouterr().err
    assert status in (0, 2) and text.count("\n") == (status == 2), text
    assert not text or str(root) in text
    return text


@pytest.mark.parametrize("file", ["results.json", "held_out.json", "metrics.jsonl", "config.yaml", "before.json"])
@pytest.mark.parametrize("made", [a_run, a_comparison])
def test_any_value_anywhere_makes_a_report_or_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made: Any, file: str
) -> None:
    root = made(tmp_path / "run")
    pieces = held_out({"native": 0.0, "scaled": 1.7, "restored": 0.153}, 0.1, length=128)
    (root / "held_out.json").write_text(
        json.dumps({m: {k: dict(list(p.items())[:6]) for k, p in v.items()} for m, v in pieces.items()})
    )
    results = json.loads((root / "results.json").read_text())
    if file == "before.json":
        (root / "results.json").unlink()
        (root / file).write_text(json.dumps({name: results[name] for name in ("native", "scaled")}))
    if file == "metrics.jsonl" and not (root / file).exists():
        file = "relation/metrics.jsonl"
    path = root / file
    good = path.read_text()
    lines = good.splitlines() if file.endswith("jsonl") else [good]
    value = (
        {"model": "m", "factor": 4.0, "compare": None, "objective": "ce"} if "yaml" in file else json.loads(lines[0])
    )
    rng = random.Random(file)
    all_places = list(places(value))
    chosen = rng.sample(all_places, min(8, len(all_places)))
    outcomes = set()
    for place in chosen:
        for bad in rng.sample(VALUES, 3):
            for key in (False, True):
                text = json.dumps(replaced(value, place, bad, key=key))
                path.write_text("\n".join([text, *lines[1:]]) + "\n")
                outcomes.add(bool(complaint(root, capsys)))
    assert outcomes == {True, False} or "yaml" in file


@pytest.mark.parametrize("file", ["results.json", "held_out.json", "metrics.jsonl", "config.yaml"])
@pytest.mark.parametrize(
    "text",
    [
        b"NaN",
        b"[" * 100_000,
        b'{"a": ' * 5000,
        b'{"a": 1e999}',
        b'{"loss": ' + b"9" * 5000 + b"}",
        b"\xff\xfe{}",
        b'{"a": "\\ud800"}',
        b"",
        b"\x00",
        b'"x"',
        b"[]",
        b"3",
        b"{]",
        b"!!python/object:os.system {}",
        b"a: &a [*a, *a]",
        b"a: 2020-13-45",
        b"a: .nan",
        b"{? [a]: b}",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_a_file_of_anything_makes_a_report_or_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, text: bytes
) -> None:
    root = a_run(tmp_path / "run")
    (root / file).write_bytes(text + b"\n")
    said = complaint(root, capsys)
    assert not said or file in said
    assert bool(said) != (root / "report.html").exists()


def test_a_byte_order_mark_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = a_run(tmp_path / "run")
    for name in ("results.json", "metrics.jsonl", "config.yaml"):
        (root / name).write_bytes(b"\xef\xbb\xbf" + (root / name).read_bytes())
    assert not complaint(root, capsys)
    assert "Short text is restored" in (root / "report.md").read_text()


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("results.json", "metrics.jsonl", "config.yaml", "held_out.json"):
        root = a_run(tmp_path / f"run of {name}")
        (root / name).unlink(missing_ok=True)
        (root / name).mkdir()
        assert f"{name} is a directory" in complaint(root, capsys)


def test_without_permission_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, so the missing permission is played."""
    root = a_run(tmp_path / "run")

    def refuse(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    for method in ("stat", "read_text"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, refuse)
            status = run_command(lambda: command([str(root)]))
        text = capsys.readouterr().err
        assert status == 2 and "Permission denied" in text and text.count("\n") == 1, method


@pytest.mark.parametrize("seed", range(20))
def test_axes_hold_any_numbers(seed: int) -> None:
    rng = random.Random(seed)
    extremes = [0.0, 1e306, 1e-300, 1.0, 1e-12, 3.7e5, 5e15, 1e300]
    for _ in range(50):
        values = [rng.choice(extremes) * rng.choice([1, 1, 1 + 1e-15, rng.random() + 1]) for _ in range(3)]
        signed = [value * rng.choice([1, -1]) for value in values]
        for axis in (linear_axis(signed), linear_axis(signed, zero=True), log_axis([max(v, 1e-300) for v in values])):
            assert 1 <= len(axis.ticks) <= 12 and axis.low < axis.high and all(map(number, axis.ticks))
            line_chart([], axis, axis, x_label="x", y_label="y")
