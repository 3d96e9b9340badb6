"""Documents as complete texts."""

from __future__ import annotations

from pathlib import Path

from mlx_linearard.data import read_documents


def test_documents_are_joined_from_their_pieces(tmp_path: Path) -> None:
    """A text of several pieces is one document; a folder has one document per file, in order of name."""
    long = "A sentence of some words. " * 10_000
    (tmp_path / "a.txt").write_text(long)
    (tmp_path / "b.txt").write_text("short")
    assert list(read_documents(str(tmp_path))) == [long, "short"]
