"""The export command: the next command that it prints can be pasted into a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from mlx_linearard.export import __main__ as command


@pytest.mark.parametrize("name", ["out", "my model", "a;touch b", "$(touch b)", "it's"])
@pytest.mark.parametrize("form", ["mlx", "adapters"])
def test_the_next_command_names_the_directory_as_one_word(
    tmp_path: Path, name: str, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "export", lambda run, out, **_: out)
    assert command.run(["--run", "x", "--to", str(tmp_path / name), "--format", form]) == 0
    words = shlex.split(capsys.readouterr().out.split("next: ")[1], comments=True)
    model = words[words.index("--model") + 1]
    assert model == str(tmp_path / name) + ("/base" if form == "adapters" else "")
