"""The common part of all commands: the argument parser, the standard streams, and the exit status."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import shlex
import shutil
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from .errors import INTERRUPTED_STATUS, LOST_STATUS, USER_ERROR_STATUS, LostProcess, UserError, error_line, remedy

LARGEST = 2**31 - 1  # the largest integer option: sizes and counts are 32-bit numbers in mlx


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of an option that has one; a switch and a required option have none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError for a wrong command line. Subparsers made with `add_subparsers` do the same.

    common: the options that --help explains; --help-all explains every option. Without it, --help explains all.
    """

    def __init__(self, prog: str, description: str = "", *, common: Sequence[str] = (), **options: Any) -> None:
        options.setdefault("formatter_class", _Help)
        super().__init__(prog=prog, description=description, allow_abbrev=False, add_help=not common, **options)
        self._common = common
        if common:
            self.add_argument("-h", "--help", action=_CommonHelp, help="explain the common options")
            self.add_argument("--help-all", action="help", help="explain every option")

    def format_common_help(self) -> str:
        """The help of the common options."""
        formatter = self._get_formatter()
        formatter.add_text(f"usage: {self.prog} [options]")
        formatter.add_text(self.description)
        formatter.start_section("common options")
        of_flag = self._option_string_actions
        formatter.add_arguments([of_flag[name] for name in (*self._common, "--help-all")])
        formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}{self._meant(message)}; see {self.prog} --help")

    def _meant(self, message: str) -> str:
        """The option that is most like the first one that `message` says is unknown; '' if none is."""
        match = re.fullmatch(r"unrecognized arguments: (--[^\s=]{2,40}).*", message, re.DOTALL)
        near = difflib.get_close_matches(match[1], self._option_string_actions, n=1, cutoff=0.7) if match else []
        return f"; did you mean {near[0]}?" if near else ""


class _CommonHelp(argparse.Action):
    """Print the help of the common options, and end."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=options["help"])

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, Parser)
        print(parser.format_common_help(), end="")
        parser.exit()


class Elsewhere(argparse.Action):
    """A flag of another tool, which is refused with the reason `instead`. It is not in --help."""

    def __init__(self, option_strings: Sequence[str], dest: str, instead: str, **_: Any) -> None:
        super().__init__(
            option_strings, argparse.SUPPRESS, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        self.instead = instead

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, flag: str | None = None) -> None:
        raise UserError(f"{flag} is an option of mlx_lm.lora: {self.instead}")


def add_old_name(parser: argparse.ArgumentParser, old: str, name: str) -> None:
    """Let the option `name`, which takes a value, have its earlier name too. It is not in --help."""
    parser._option_string_actions[old] = parser._option_string_actions[name]


def integer(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """An argparse type: a whole number in ASCII digits from `least` to `most`."""

    def parse(text: str) -> int:
        if re.fullmatch(r"[+-]?[0-9]{1,20}", text) and least <= (value := int(text)) <= most:
            return value
        raise argparse.ArgumentTypeError(f"{text[:40]} is not a whole number from {least} to {most}")

    return parse


def shell_command(*words: object) -> str:
    """A command line, on one line, that bash and zsh read as exactly these words."""
    return " ".join(_quoted(str(word)) for word in words)


def shell_lines(words: Sequence[object], width: int | None = None, indent: str = "") -> str:
    """`shell_command(*words)`, indented; in several lines that a shell reads as one if `width` columns are too few."""
    groups: list[str] = []  # an option stays beside its value
    for word in map(str, words):
        if groups and groups[-1].startswith("--") and " " not in groups[-1] and not word.startswith("--"):
            groups[-1] += f" {_quoted(word)}"
        else:
            groups.append(_quoted(word))
    lines = [indent + groups[0]]
    for group in groups[1:]:
        if width is not None and len(f"{lines[-1]} {group} \\") > width:
            lines[-1] += " \\"
            lines.append(f"{indent}  {group}")
        else:
            lines[-1] += f" {group}"
    return "\n".join(lines)


def runnable(words: Sequence[object]) -> tuple[object, ...]:
    """A command line that runs where this process runs: `python -m COMMAND` if the command is not on the PATH."""
    name = str(words[0])
    if shutil.which(name):
        return tuple(words)
    found, own = shutil.which("python"), Path(sys.executable)
    same = found is not None and Path(found).absolute() == own.absolute()
    return ("python" if same else path_word(own), "-m", *words)


def path_word(path: str | os.PathLike[str]) -> str:
    """A path as a word of a command line: one that begins with a dash must not be read as an option."""
    text = os.fspath(path)
    return f"./{text}" if text.startswith("-") else text


def _quoted(word: str) -> str:
    """`word` in single quotes if it needs them; unprintable characters and bytes as $'\\x1b'."""
    if word.isprintable():
        return shlex.quote(word)
    marked = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return "$'" + "".join(marked.get(c) or (c if c.isprintable() else _escaped_bytes(c)) for c in word) + "'"


def _escaped_bytes(character: str) -> str:
    try:
        data = os.fsencode(character)
    except UnicodeEncodeError:  # half of a surrogate pair that encodes no byte of a file name
        data = "\ufffd".encode()
    return "".join(f"\\x{byte:02x}" for byte in data)


def run_command(body: Callable[[], int | None]) -> int:
    """Run a command's body and return its exit status.

    0: done. 2: a user's mistake, or a failure of the platform whose remedy is known, such as a full memory. 3: another
    process of this run was lost. 130: interrupted. Each status except 0 comes with one line on standard error. Any
    other exception is a bug and keeps its traceback.

    If standard output is closed or full, the command continues without it. Characters that a stream cannot encode
    are escaped.
    """
    with _lasting_streams():
        try:
            return body() or 0
        except UserError as error:
            print(error_line(error), file=sys.stderr)
            return USER_ERROR_STATUS
        except LostProcess as error:
            print(error_line(error), file=sys.stderr)
            return LOST_STATUS
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return INTERRUPTED_STATUS
        except (RuntimeError, MemoryError, OSError) as error:
            if (help_ := remedy(error)) is None:
                raise
            print(error_line(f"{help_} ({error})"), file=sys.stderr)
            return USER_ERROR_STATUS


# ---------------------------------------------------------------------------------------------------
# Standard streams


@contextlib.contextmanager
def _lasting_streams() -> Iterator[None]:
    """Standard output and error that never raise, while the block runs."""
    _open_closed_streams()
    before = sys.stdout, sys.stderr
    out, err = LastingStream(sys.stdout), LastingStream(sys.stderr)
    sys.stdout, sys.stderr = typing.cast(TextIO, out), typing.cast(TextIO, err)
    try:
        yield
    finally:
        out.flush()
        if out.failure and not isinstance(out.failure, BrokenPipeError):  # `... | head` is no failure
            print(
                f"standard output could not be written ({out.failure}): the rest of the output is lost", file=sys.stderr
            )
        err.flush()
        sys.stdout, sys.stderr = before


def _open_closed_streams() -> None:
    """Open the null device in place of closed standard streams, so that no other file takes their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Python sets a stream that was closed at its start to None.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, PTH123
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123


class LastingStream:
    """A text stream that is dropped after its first failure, and that escapes what it cannot encode."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failure: Exception | None = None  # why the stream was dropped

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text), lambda: self.stream.write(self._encodable(text)))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def isatty(self) -> bool:
        try:
            return self.failure is None and self.stream.isatty()
        except ValueError:  # closed
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _encodable(self, text: str) -> str:
        encoding = self.stream.encoding or "ascii"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def _try(self, write: Callable[[], object], escaped: Callable[[], object] | None = None) -> None:
        if self.failure:
            return
        try:
            write()
        except UnicodeEncodeError:
            if escaped:
                self._try(escaped)
        except (OSError, ValueError) as error:
            self.failure = error
            self._discard()

    def _discard(self) -> None:
        """Send the buffered text to the null device, because Python writes the buffer again when it exits."""
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)
