"""Files and options that no evaluation can use: status 2 and one line on standard error, whichever library fails."""

from __future__ import annotations

import gzip
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import PROSE

from mlx_linearard.cli import run_command
from mlx_linearard.evaluate.__main__ import run

LONG = "x" * 300
DIGITS = "9" * 5000
ITEM = '{"query": "q", "choices": ["a", "b"], "gold": 0}\n'


def one_line(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The only line that a command prints on standard error, seen from outside the process; it has status 2."""
    capfd.readouterr()
    assert run_command(lambda: run(arguments)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def edited(file: str, **values: Any) -> Callable[[Path], object]:
    """A change of the object in a JSON file of a model directory."""

    def edit(model: Path) -> None:
        path = model / file
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))

    return edit


def written(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda model: (model / file).write_bytes(content)


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}
MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "panic": (edited("tokenizer.json", post_processor=TEMPLATE), "tokenizer.json is damaged"),
    "unknown": (edited("tokenizer.json", model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "u"}), "failed"),
    "no-unk": (edited("tokenizer.json", model={"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]}), "failed"),
    "empty": (written("tokenizer.json", b""), "tokenizer.json is not valid JSON"),
    "list": (written("generation_config.json", b"[1]"), "generation_config.json must hold a JSON object"),
    "cut": (written("generation_config.json", b"{"), "generation_config.json is not valid JSON"),
    "nan": (written("generation_config.json", b'{"temperature": NaN}'), "generation_config.json is not valid JSON"),
    "digits": (written("generation_config.json", b'{"a": %s}' % DIGITS.encode()), "5000 digits"),
    "end": (edited("config.json", eos_token_id="x"), "config.json: eos_token_id must be"),
    "no-class": (edited("tokenizer_config.json", bos_token=5), "the tokenizer of"),
    "window": (edited("config.json", max_position_embeddings=10**30), "max_position_embeddings"),
}


@pytest.mark.parametrize("name", MODELS)
def test_damaged_model_directories(
    model_dir: Path, text_file: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    change, says = MODELS[name]
    model = shutil.copytree(model_dir, tmp_path / "model")
    change(model)
    out = tmp_path / "out.json"
    assert says in one_line(
        ["--model", str(model), "--suite", "ppl", "--data", str(text_file), "--lengths", "32", "--out", str(out)], capfd
    )
    assert not out.exists() and not (tmp_path / "out.items").exists()


ITEMS: dict[str, tuple[bytes, str]] = {
    "nan.jsonl": (b'{"query": "q", "choices": ["a", "b"], "gold": NaN}', "line 1 is not valid JSON"),
    "digits.jsonl": (b'{"query": "q", "choices": ["a", "b"], "gold": %s}' % DIGITS.encode(), "5000 digits"),
    "deep.jsonl": (ITEM.encode() + b"[" * 100_000, "line 2 is not valid JSON"),
    "list.jsonl": (b"[1]", "line 1 must hold a JSON object"),
    "latin.jsonl": (b'{"query": "caf\xe9"}', "not UTF-8"),
    "empty.jsonl": (b"", "is empty"),
    "cut.jsonl.gz": (gzip.compress(ITEM.encode(), mtime=0)[:-6], "is damaged"),
    "other.jsonl.gz": (ITEM.encode(), "cannot be read"),
    "bits.jsonl.xz": (lzma.compress(ITEM.encode() * 50)[:40] + b"\xff" * 60, "is damaged"),
    "float.jsonl": (b'{"query": "q", "choices": ["a", "b"], "gold": 0.0}', "`gold` is 0.0"),
    "text.jsonl": (b'{"query": "q", "choices": "ab", "gold": 0}', "no `choices`"),
}


@pytest.mark.parametrize("name", ITEMS)
def test_damaged_items(model_dir: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    content, says = ITEMS[name]
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out.json"
    line = one_line(
        ["--model", str(model_dir), "--suite", "choice", "--data", str(tmp_path / name), "--out", str(out)], capfd
    )
    assert says in line and name in line and not out.exists()


def test_half_a_surrogate_pair_in_items_is_replaced(model_dir: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "lone.jsonl", tmp_path / "out.json"
    path.write_text(
        '{"query": "smile \\ud83d", "choices": ["a", "b\\ude00"], "gold": 0, "text": "smile and \\ud83d"}\n'
    )
    for suite in ("choice", "lambada"):
        assert run(["--model", str(model_dir), "--suite", suite, "--data", str(path), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["tiny"]["choice/lone"]["metrics"]["acc"]["n"] == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", LONG], "File name too long"),
        (["--model", f"{LONG}={LONG}"], "File name too long"),
        (["--model", "nul\0"], ""),
        (["--reference", LONG, "--suite", "fidelity"], "File name too long"),
        (["--data", LONG], "cannot be read"),
        (["--data", "nul\0"], "is not a file name"),
        (["--out", f"{LONG}.json"], "cannot be read: File name too long"),
        (["--out", f"{LONG}/r.json"], "File name too long"),
        (["--out", "/dev/null"], "is not a regular file"),
        (["--out", ""], "--output is empty"),
        (["--run", LONG], "one of --model DIR and --run RUN"),
        (["--model", "a\nb=MODEL"], "cannot be called 'a\\nb'"),
        (["--model", "a\udcff=MODEL"], "cannot be called 'a\\udcff'"),
        (["--lengths", "٣٢"], "--lengths"),
        (["--lengths", DIGITS], "must be whole numbers from 2 to 2147483647"),
        (["--tokens", DIGITS], "is not a whole number from 1"),
        (["--chunk", "2147483648"], "is not a whole number from 1"),
        (["--seed", "-1"], "is not a whole number from 0"),
        (["--samples", "2147483647"], "is not a whole number from 1 to 100000"),
        (["--depths", "101"], "must be whole numbers from 0 to 100"),
        (["--stride", "1.5"], "is not a whole number from 0"),
    ],
)  # fmt: skip
def test_impossible_options(
    model_dir: Path, text_file: Path, tmp_path: Path, words: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model_dir), "--suite", "ppl", "--data", str(text_file), "--lengths", "32"]
    more = [word.replace("MODEL", str(model_dir)) for word in words]
    if "--out" not in words:
        more += ["--out", str(tmp_path / "out.json")]
    elif words[1].startswith(LONG):
        more[1] = str(tmp_path / words[1])
    assert says in one_line([*arguments, *more], capfd)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("model: [a\n", "is not valid YAML"),
        ("model: !!python/object/apply:os.system ['true']\n", "is not valid YAML"),
        (f"steps: {DIGITS}\n", "5000 digits"),
        ("[" * 5000, "is not valid YAML"),
        ("- a\n", "does not name the native model"),
        ("steps: 3\n", "does not name the native model"),
        ("model: 5\n", "does not name the native model"),
        ("model: [1, 2]\n", "does not name the native model"),
        ("caf\udce9: 3\n", "not UTF-8"),
    ],
)
def test_damaged_runs(
    model_dir: Path, text_file: Path, tmp_path: Path, config: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    for name in ("model", "base"):
        shutil.copytree(model_dir, root / name)
    (root / "config.yaml").write_bytes(config.encode("utf-8", "surrogateescape"))
    assert says in one_line(["--run", str(root), "--suite", "ppl", "--data", str(text_file)], capfd)
    assert not (root / "results.json").exists()


def test_text_in_every_damaged_form(model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = (PROSE * 60).encode()
    for name, content, says in (
        ("cut.txt.gz", gzip.compress(text, mtime=0)[:60], "is damaged"),
        ("bits.txt.xz", lzma.compress(text)[:-40] + b"\0" * 40, "is damaged"),
        ("plain.txt.xz", text, "is damaged"),
        ("wide.txt", text.decode().encode("utf-16"), "not UTF-8"),
        ("null.txt", text + b"\0", "is binary"),
    ):
        (tmp_path / name).write_bytes(content)
        line = one_line(
            ["--model", str(model_dir), "--suite", "ppl", "--data", str(tmp_path / name), "--lengths", "32"], capfd
        )
        assert says in line and name in line


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "other.json"])
def test_another_json_file_is_not_taken_for_results(
    model_dir: Path, text_file: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_dir, model := tmp_path / "model")
    (model / "other.json").write_text('{"results": {"task": {"acc": 0.5}}}')
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    options = ["--suite", "ppl", "--data", str(text_file), "--lengths", "32", "--tokens", "64"]
    line = one_line(["--model", str(model), *options, "--out", str(model / name)], capfd)
    assert f"{name} holds no results, but something else" in line
    assert before == {path.name: path.read_bytes() for path in model.iterdir()}
