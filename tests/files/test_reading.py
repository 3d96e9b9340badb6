"""Damaged, odd and unreadable files: one UserError that names the file, and the right value for sound ones."""

from __future__ import annotations

import gzip
import lzma
import os
from pathlib import Path

import pytest

from mlx_linearard.errors import UserError
from mlx_linearard.files import (
    parse_json,
    read_config,
    read_json,
    read_json_lines,
    read_object,
    read_text,
    read_yaml,
    reading,
)

READERS = [read_text, read_json, read_object, read_yaml, lambda path: list(read_json_lines(path))]


def refused(read, path: Path, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    message.encode("ascii", "strict") if path.name.isascii() else message.encode()


@pytest.mark.parametrize("read", READERS)
def test_paths_that_are_not_a_readable_file(read, tmp_path: Path) -> None:
    refused(read, tmp_path / "none.json", "none.json does not exist")
    refused(read, tmp_path, f"{tmp_path} is a directory, not a file")
    refused(read, tmp_path / ("x" * 300), "File name too long")
    refused(read, tmp_path / "a\0b", "not a file name")
    refused(read, tmp_path / "\ud800", "not a file name")
    (tmp_path / "text").write_text("x")
    refused(read, tmp_path / "text" / "inside", "cannot be read: Not a directory")
    (tmp_path / "loop").symlink_to("loop")
    refused(read, tmp_path / "loop", "cannot be read: ")
    os.mkfifo(tmp_path / "pipe")
    refused(read, tmp_path / "pipe", "pipe is not a regular file")
    refused(read, Path("/dev/zero"), "/dev/zero is not a regular file")


@pytest.mark.parametrize("read", READERS)
def test_a_file_without_permission(read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "closed.json"
    path.write_text("{}")

    def denied(*arguments, **keywords):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("io.open", denied)  # tests may run as root, whom no mode stops
    refused(read, path, "closed.json cannot be read: Permission denied")


@pytest.mark.parametrize("read", READERS)
def test_bytes_that_are_not_utf8(read, tmp_path: Path) -> None:
    for data in (b"caf\xe9", b"\xff\xfe{\0}\0", b"\xed\xa0\x80"):
        (tmp_path / "bytes").write_bytes(data)
        refused(read, tmp_path / "bytes", "bytes cannot be read: not UTF-8 text")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "bom"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert read_text(path) == '{"a": 1}\n'
    assert read_json(path) == read_object(path) == read_yaml(path) == {"a": 1}
    assert list(read_json_lines(path)) == [(1, {"a": 1})]


JSON = [
    ("{", "not valid JSON"),
    ("", "not valid JSON"),
    ("[NaN]", "NaN is not a JSON number"),
    ('{"a": -Infinity}', "Infinity is not a JSON number"),
    ("1e999", "the number 1e999 is too large"),
    ("9" * 5000, "an integer of 5000 digits is too large"),
    ("-" + "9" * 4000, "digits is too large"),
    ("[" * 100_000, "nested too deeply"),
    ("[" * 101 + "]" * 101, "nested too deeply"),
    ('{"a":' * 101 + "1" + "}" * 101, "nested too deeply"),
    ('["\\ud83d"]', "half of a surrogate pair"),
    ('{"\\uDC00": 1}', "half of a surrogate pair"),
    ("{'a': 1}", "not valid JSON"),
    ("{} {}", "not valid JSON"),
]


@pytest.mark.parametrize(("text", "said"), JSON)
def test_json_that_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    refused(read_json, path, rf"bad\.json.*{said}")
    refused(read_object, path, said)
    with pytest.raises(UserError, match=rf"^there: 3.*{said}"):
        parse_json(text, "there: 3")


def test_json_of_sound_but_unusual_values() -> None:
    limit = 1000000000000000019884624838656  # transformers' model_max_length for "no limit"
    assert parse_json(f"[{limit}, -0.0, 1e-400, true, null]", "x") == [limit, 0.0, 0.0, True, None]
    assert parse_json('"\\ud83d\\ude00"', "x") == "😀"
    assert parse_json('["\\ud83d", {"\\udc00": "\\ude00\\ud83d"}]', "x", replace_surrogates=True) == [
        "\ufffd",
        {"\ufffd": "\ufffd\ufffd"},
    ]
    assert parse_json("[" * 99 + "]" * 99, "x")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"text"', "true"])
def test_an_object_is_expected(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    refused(read_object, tmp_path / "config.json", "must hold a JSON object, not ")
    refused(read_config, tmp_path, "config.json must hold a JSON object, not ")


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": "\u2028"}\n{"a": NaN}\n')
    rows = read_json_lines(path)
    assert [next(rows), next(rows)] == [(1, {"a": 1}), (3, {"a": "\u2028"})]
    refused(lambda _: next(rows), path, "rows.jsonl line 4 is not valid JSON: NaN")


YAML = [
    ("a: [", "not valid YAML"),
    ("a:\t{", "not valid YAML"),
    ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ("a: !!int ''", "not valid YAML"),
    ("a: !!float ''", "not valid YAML"),
    ("a: !!bool maybe", "not valid YAML"),
    ("a: !!timestamp today", "not valid YAML"),
    ("a: 2020-13-45", "not valid YAML"),
    ("a: .nan", "not finite"),
    ("a: -.inf", "not finite"),
    ("a: " + "9" * 5000, "an integer of 5000 digits"),
    ("a: 0x" + "f" * 5000, "digits is too large"),
    ("[" * 5000, "nested too deeply|not valid YAML"),
    ("[" * 101 + "]" * 101, "nested too deeply"),
    ("a: &x [*x]", "anchors"),
    ("a: &x [1]\nb: *x", "anchors"),
    ('a: "\\ud83d"', "not valid YAML"),
    ("? {a: b}\n: c", "not valid YAML"),
    ("a: 1\x07", "not valid YAML"),
]


@pytest.mark.parametrize(("text", "said"), YAML)
def test_yaml_that_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    refused(read_yaml, path, rf"bad\.yaml.*({said})")


def test_yaml_of_plain_types(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text("a: 1\nb: [0x10, 1.5, yes, null]\nc: é\n", encoding="utf-8")
    assert read_yaml(path) == {"a": 1, "b": [16, 1.5, True, None], "c": "é"}


@pytest.mark.parametrize(("pack", "opened"), [(gzip.compress, gzip.open), (lzma.compress, lzma.open)])
def test_damaged_compression(tmp_path: Path, pack, opened) -> None:
    packed = pack(os.urandom(5000))
    for name, data in (("cut", packed[:-900]), ("other", b"plain text"), ("flipped", packed[:600] + b"\0" * 900)):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"{name} (is damaged|cannot be read): .+"), reading(path):
            opened(path).read()
