"""Measurements kept in the user's cache: found by all that they depend on, bounded, safe from damage."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlx_linearard.results.kept import VARIABLE, Kept

DEPENDS = {"model": "abc", "options": {"lengths": [1, 2]}}


def test_a_measurement_is_found_by_all_that_it_depends_on(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "new" / "folder")
    assert kept.read(DEPENDS) is None
    kept.write(DEPENDS, [{"id": "0"}])
    assert kept.read(DEPENDS) == [{"id": "0"}]
    assert kept.read({**DEPENDS, "model": "abd"}) is None
    kept.write(DEPENDS, [{"id": "1"}])
    assert kept.read(DEPENDS) == [{"id": "1"}] and len(list(kept.folder.iterdir())) == 1


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"depends_on": 3, "measured": []}', '{"measured": [1]}', "\xff"])
def test_a_damaged_file_counts_as_missing(tmp_path: Path, damage: str) -> None:
    kept = Kept(tmp_path)
    kept.write(DEPENDS, [1])
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage.encode("latin-1"))
    assert kept.read(DEPENDS) is None
    kept.write(DEPENDS, [2])
    assert kept.read(DEPENDS) == [2]


def test_the_files_used_longest_ago_are_removed_and_no_others(tmp_path: Path) -> None:
    kept = Kept(tmp_path, limit=5000)
    (tmp_path / "mine.json").write_text("x" * 9000)
    for number in range(4):
        kept.write(number, "y" * 1000)
        os.utime(kept._path(number), (number + 1, number + 1))
    assert kept.read(0) is not None  # used now, so it is not the first to go
    kept.write(4, "y" * 2500)
    assert [kept.read(number) is not None for number in range(5)] == [True, False, False, True, True]
    assert (tmp_path / "mine.json").exists()


def test_a_folder_that_cannot_be_used_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = Kept(tmp_path / "file" / "folder")
    kept.write(DEPENDS, [1])
    assert kept.read(DEPENDS) is None


def test_several_writers_leave_a_complete_file(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: kept.write(DEPENDS, [number] * 2000), range(40)))
    value = kept.read(DEPENDS)
    assert len(value) == 2000 and len(set(value)) == 1 and len(list(tmp_path.iterdir())) == 1


def test_the_folder_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    assert Kept.of_user() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    kept = Kept.of_user()
    assert kept and kept.folder == tmp_path
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = Kept.of_user()
    assert kept and kept.folder == tmp_path / "mlx_linearard" / "evaluations"
