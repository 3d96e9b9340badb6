"""Reading: every failure to open, decode or parse a named file becomes a UserError that names the file."""

from __future__ import annotations

import contextlib
import json
import lzma
import math
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..errors import UserError, one_line
from .names import CONFIG

MAX_TEXT = 1 << 30  # bytes of a JSON, YAML or template file; the largest tokenizer.json files have 40 MB
MAX_DEPTH = 100  # levels of nested lists and objects
MAX_DIGITS = 100  # digits of an integer; transformers writes 31 for "no limit"


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn any failure to open, read, decompress or decode `path` into a UserError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{shown(path)} does not exist") from None
    except OSError as error:
        reason = error.strerror or one_line(error)  # gzip raises an OSError without a number
        raise UserError(f"{shown(path)} cannot be read: {reason}") from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{shown(path)} is damaged: {one_line(error)}") from None
    except UnicodeEncodeError:  # the path itself cannot be encoded
        raise UserError(f"{shown(path)} is not a file name that this system can hold") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{shown(path)} cannot be read: not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    except ValueError as error:
        if str(error) != "embedded null byte":
            raise
        raise UserError(f"{shown(path)} is not a file name") from None


def check_file(path: str | Path) -> Path:
    """`path`, if it is a regular file or a link to one; UserError if it is missing, a folder, a pipe or a device."""
    path = Path(path)
    with reading(path):
        mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise UserError(f"{shown(path)} is a directory, not a file")
    if not stat.S_ISREG(mode):
        raise UserError(f"{shown(path)} is not a regular file: copy its contents to a file first")
    return path


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark; UserError if it cannot be read."""
    path = check_file(path)
    with reading(path):
        size = path.stat().st_size
        if size > MAX_TEXT:
            raise UserError(f"{shown(path)} has {size / 1e9:.1f} GB, too many for a file of its kind")
        return path.read_text(encoding="utf-8-sig")


def parse_json(text: str, name: str, *, replace_surrogates: bool = False) -> Any:
    """The JSON value of `text`; UserError that begins with `name` (a file, or a file and a line) if `text` is not JSON.

    Refused beside bad syntax: NaN, infinity, integers of more than 100 digits, more than 100 levels, and half of
    a surrogate pair. With `replace_surrogates` each half becomes U+FFFD instead.
    """

    def constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is not a JSON number")

    try:
        value = json.loads(text, parse_constant=constant, parse_float=_finite, parse_int=_integer)
        _check_depth(value)
    except RecursionError:
        raise UserError(f"{shown(name)} is not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{shown(name)} is not valid JSON: {one_line(error)[:200]}") from None
    if _HALF.search(text):
        replaced = without_surrogates(value)
        if not replace_surrogates and replaced != value:
            raise UserError(f"{shown(name)} is not valid JSON: it holds half of a surrogate pair (\\ud800 to \\udfff)")
        return replaced
    return value


_HALF = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits is too large")
    return int(text)


def _check_depth(value: Any) -> None:
    """ValueError if `value` has more than MAX_DEPTH levels of lists and dicts."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for container in level
            if isinstance(container, list | dict)
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, list | dict)
        ]
        if not level:
            return
    raise ValueError("nested too deeply")


def without_surrogates(value: Any) -> Any:
    """A JSON value with U+FFFD in place of each half of a surrogate pair."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(item) for key, item in value.items()}
    return value


def read_json(path: str | Path) -> Any:
    """The JSON value in `path`; UserError if it is missing, unreadable or not JSON (see `parse_json`)."""
    return parse_json(read_text(path), str(path))


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in `path`; UserError if it cannot be read or is another kind of value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{shown(path)} must hold a JSON object, not {type(value).__name__}")
    return value


def read_config(model_dir: str | Path) -> dict[str, Any]:
    """A model directory's config.json as a dict; UserError if it is missing or not an object."""
    return read_object(Path(model_dir) / CONFIG)


def read_json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """The number, from 1, and the JSON value of each line of `path` that is not blank; UserError names the line."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, parse_json(line, f"{path} line {number}")


def read_yaml(path: str | Path) -> Any:
    """The YAML value in `path`, from plain types only; UserError if it cannot be read.

    Refused beside bad syntax: tags, anchors, NaN, infinity, large integers and deep nesting, as in `parse_json`.
    """
    text = read_text(path)
    try:
        value = yaml.load(text, Loader=_Loader)
        _check_depth(value)
        if _HALF.search(text) and without_surrogates(value) != value:
            raise ValueError("it holds half of a surrogate pair")
    except RecursionError:
        raise UserError(f"{shown(path)} is not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError, KeyError, IndexError, AttributeError) as error:  # the last three: bad tags
        raise UserError(f"{shown(path)} is not valid YAML: {one_line(error)[:300]}") from None
    return value


class _Loader(yaml.SafeLoader):
    """Plain YAML without anchors, whose numbers are finite and not too long."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("anchors (&, *) are not read: write the value out")
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > MAX_DIGITS:
            raise ValueError(f"an integer of {len(node.value)} digits is too large")
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> float:
        value = super().construct_yaml_float(node)
        if not math.isfinite(value):
            raise ValueError(f"the number {node.value[:20]} is not finite")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def shown(path: str | Path) -> str:
    """A path for a message, in characters that any terminal encodes."""
    return str(path).encode("utf-8", "backslashreplace").decode()
