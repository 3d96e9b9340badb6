"""The rooms of the package: their order, their size, and that imports never form a circle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "mlx_linearard"

# A room imports only itself and the rooms before it.
ROOMS = (
    "errors", "files", "machine", "rope", "config", "cli", "progress", "data", "ops", "models", "distributed",
    "convert", "results", "report", "evaluate", "export", "distill", "doctor",
)  # fmt: skip
FACADES = ("", "lazy", "__main__")  # the package itself, what makes packages load late, and all commands
MOST_LINES = 420
MOST_ENTRIES = 22


def modules() -> dict[str, Path]:
    """Each module of the package as it is installed, by its dotted name without the package's."""
    found = {}
    for root, prefix in ((ROOT / PACKAGE, ""), (ROOT / "convert", "convert.")):
        for path in root.rglob("*.py"):
            name = prefix + ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix("__init__").rstrip(".")] = path
    return found


MODULES = modules()


def imports(name: str, path: Path) -> Iterator[str]:
    """The modules of this package that a module imports at its top level or inside functions, except for types only."""
    parts = name.split(".") if name else []
    package = parts if path.name == "__init__.py" else parts[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {id(node) for block in ast.walk(tree) if _is_for_types(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or id(node) in skipped:
            continue
        base = package[: len(package) - node.level + 1]
        base += node.module.split(".") if node.module else []
        for alias in node.names:
            inner = ".".join([*base, alias.name])
            yield inner if inner in MODULES else ".".join(base)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_is_in_a_room() -> None:
    assert {room(name) for name in MODULES} == {*ROOMS, *FACADES}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_room_imports_only_rooms_before_it(name: str) -> None:
    if room(name) in FACADES:
        return
    later = [other for other in imports(name, MODULES[name]) if room(other) in ROOMS[ROOMS.index(room(name)) + 1 :]]
    assert later == []


def test_imports_form_no_circle() -> None:
    graph = {name: {other for other in imports(name, path) if other != name} for name, path in MODULES.items()}
    assert tuple(graphlib.TopologicalSorter(graph).static_order())


def test_the_package_folder_is_small_enough_to_read() -> None:
    entries = [path.name for path in (ROOT / PACKAGE).iterdir() if path.name != "__pycache__"]
    assert len(entries) < MOST_ENTRIES


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if room(name) not in ("evaluate", "convert")])
def test_no_file_is_too_long(name: str) -> None:
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= MOST_LINES
