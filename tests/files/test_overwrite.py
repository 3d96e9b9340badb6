"""--overwrite replaces only what this tool wrote; everything else stays, with one line that says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mlx_linearard.errors import UserError
from mlx_linearard.files import MARKER, check_overwrite, new_directory


def write(target: Path, text: str = "new", **options) -> Path:
    with new_directory(target, **options) as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "file").write_text(text)
        (folder / "config.json").write_text("{}")
    return target


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def refused(target: Path, said: str, *sources: Path) -> None:
    """Both the check and the writing refuse, and nothing near the target changes."""
    parent = target.parent
    before = tree(parent)
    with pytest.raises(UserError, match=said) as caught:
        check_overwrite(target, sources)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=said):
        write(target, overwrite=True, sources=sources)
    assert tree(parent) == before


def test_what_this_tool_wrote_is_replaced(tmp_path: Path) -> None:
    target = write(tmp_path / "out", "old")
    assert json.loads((target / MARKER).read_text())["files"] == ["config.json", "inside/file"]
    (target / ".DS_Store").write_bytes(b"\0")  # Finder's
    write(target, "new", overwrite=True)
    assert (target / "inside" / "file").read_text() == "new" and not (target / ".DS_Store").exists()
    (target / "inside" / "file").unlink()
    write(target, overwrite=True)  # a file that is gone is nobody's loss
    write(tmp_path / "fresh", overwrite=True)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "fresh", "out"]


def test_what_others_wrote_stays(tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.mkdir()
    (others / "config.json").write_text("{}")
    (others / "model.safetensors").write_text("weights")
    refused(others, f"has no valid file {MARKER}")
    for text in (
        "",
        "{}",
        "[]",
        '{"written_by": "someone", "files": []}',
        '{"written_by": "mlx-linearard"}',
        "[" * 999,
    ):
        (others / MARKER).write_text(text)
        refused(others, f"has no valid file {MARKER}")
    (others / MARKER).unlink()
    (others / MARKER).symlink_to(write(tmp_path / "ours") / MARKER)
    refused(others, f"has no valid file {MARKER}")


@pytest.mark.parametrize("name", ["notes.txt", "inside/notes.txt", "new/notes.txt", ".hidden"])
def test_a_file_added_to_an_output_is_kept(tmp_path: Path, name: str) -> None:
    target = write(tmp_path / "out")
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text("precious")
    refused(target, f"holds {name}, which this tool did not write")


def test_a_link_added_to_an_output_is_kept(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target = write(tmp_path / "out")
    (target / "link").symlink_to(tmp_path / "elsewhere")
    refused(target, "holds link, which")


def test_a_target_around_or_in_the_source(tmp_path: Path) -> None:
    target = write(tmp_path / "out")
    (tmp_path / "way").symlink_to(target)
    refused(target, "out is the source", target)
    refused(target, "out contains the source", target / "inside")
    refused(target, "out contains the source", tmp_path / "way" / "config.json")
    refused(target / "inside", "is inside the source", target)
    refused(tmp_path / "way" / "inside", "is inside the source", target)
    write(target, overwrite=True, sources=[tmp_path / "other", Path("elsewhere")])


def test_a_source_that_is_a_link_in_the_target(tmp_path: Path) -> None:
    """The target may hold the link through which the source is read."""
    (tmp_path / "real.gguf").write_text("weights")
    target = write(tmp_path / "out")
    (target / "source.gguf").symlink_to(tmp_path / "real.gguf")
    refused(target, "contains the source", target / "source.gguf")


def test_links_and_files_are_not_followed(tmp_path: Path) -> None:
    target = write(tmp_path / "out")
    (tmp_path / "link").symlink_to(target)
    refused(tmp_path / "link", "is a link")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "dangling", "is a link")
    (tmp_path / "file").write_text("precious")
    refused(tmp_path / "file", "is a file")


def test_places_that_are_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write(tmp_path / "out")
    monkeypatch.chdir(target / "inside")
    refused(target, "contains the current directory")
    refused(target / "inside", "is the current directory")
    refused(Path(), "is the current directory")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(target / "inside"))
    refused(target, "contains the home directory")
    monkeypatch.setenv("HOME", str(target))
    refused(target, "is the home directory")
    with pytest.raises(UserError, match="contains the"):
        check_overwrite("/")
    with pytest.raises(UserError, match="is a mounted disk"):
        check_overwrite("/proc")
    monkeypatch.setenv("HOME", "/nowhere")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    write(target, overwrite=True)  # no current directory is no reason to fail


def test_an_empty_current_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    inode = Path().stat().st_ino
    for target in (Path(), tmp_path / "here", Path("../here")):
        for overwrite in (False, True):
            with pytest.raises(UserError, match="is the current directory"):
                write(target, overwrite=overwrite)
    assert (tmp_path / "here").stat().st_ino == inode


def test_a_target_that_changes_while_the_block_runs(tmp_path: Path) -> None:
    target = write(tmp_path / "out", "old")
    with pytest.raises(UserError, match="notes"), new_directory(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        (target / "notes").write_text("precious")
    assert (target / "notes").read_text() == "precious" and (target / "inside" / "file").read_text() == "old"
    with pytest.raises(UserError, match="already exists"), new_directory(tmp_path / "late") as folder:
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "notes").touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["late", "out"]
