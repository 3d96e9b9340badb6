"""The wheel carries every room: built, installed into an empty environment, imported and run there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("mlx_linearard", "convert", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty virtual environment with the wheel alone, and this environment's libraries behind it."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(work), str(source)]
    subprocess.run(build, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(work / "venv")], check=True)
    site = next((work / "venv" / "lib").glob("python*/site-packages"))
    install = [
        *pip,
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        *map(str, work.glob("*.whl")),
    ]
    subprocess.run(install, check=True)
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return work / "venv"


def python(environment: Path, *arguments: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [str(environment / "bin" / "python"), *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=clean,
        cwd=environment,
    ).stdout


def test_every_room_imports_from_the_wheel(environment: Path) -> None:
    rooms = sorted(
        p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for p in [*(ROOT / "mlx_linearard").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]
        if p.name not in ("__init__.py", "__main__.py")
    )
    names = [f"mlx_linearard.{room}" if room.startswith("convert.") else room for room in rooms]
    told = python(
        environment,
        "-c",
        f"import importlib\nfor name in {names}: print(importlib.import_module(name).__file__)",
    )
    files = told.split()
    assert len(files) == len(names) > 20
    assert all(file.startswith(str(environment)) for file in files)


@pytest.mark.parametrize("command", ["distill", "convert", "export", "evaluate", "report", "doctor"])
def test_commands_run_from_the_wheel(environment: Path, command: str) -> None:
    assert "usage" in python(environment, "-m", f"mlx_linearard.{command}", "--help")


def test_the_report_has_its_templates_and_style(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: smol\n")
    python(environment, "-m", "mlx_linearard.report", str(tmp_path))
    assert "<style>\n/*" in (tmp_path / "report.html").read_text() and "# smol" in (tmp_path / "report.md").read_text()


def test_both_names_of_the_main_path_are_callable(environment: Path) -> None:
    code = "import mlx_linearard as m; f = m.distill; import mlx_linearard.distill, mlx_linearard.export\n"
    told = python(
        environment,
        "-c",
        code + "print(callable(f), callable(m.distill), callable(m.export), callable(m.attention))",
    )
    assert told.split() == ["True"] * 4
