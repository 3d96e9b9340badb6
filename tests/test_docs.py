"""The README and the pages: short enough, every link and option exists, and messages are those of the program."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_linearard.config import ALSO, OTHER, SAME, DistillConfig, flag

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [*(ROOT / "mlx_linearard").rglob("*.py"), *(ROOT / "convert").glob("*.py"), *ROOT.glob("examples/**/*.py")]
OTHERS = {  # options of other programs
    "--adapter-path", "--model", "--prompt", "--tasks", "--grad-checkpoint", "--export-gguf", "--backend", "--hostfile",
    "--env", "--starting-port", "--logdir", "--strict", "--help",
}  # fmt: skip


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def cells(page: Path) -> list[str]:
    lines = [line for line in text_of(page).splitlines() if line.startswith("|")]
    return [cell.strip() for line in lines for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_the_readme_is_short() -> None:
    assert len(text_of(README).splitlines()) <= 110
    assert len(re.findall(r"(?m)^\|---", text_of(README))) == 1  # one table


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_can_be_read_on_a_phone(page: Path) -> None:
    if page.name == "CONTRIBUTING.md":
        return
    shown = [re.sub(r"\]\([^)]*\)", "]", cell) for cell in cells(page)]
    assert [cell for cell in shown if len(cell) > 60] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not re.match(r"https?:", target):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), target
            if anchor:
                heads = re.findall(r"(?m)^#+ (.+)$", text_of(file))
                assert anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}, target


def test_the_table_and_the_picture_are_of_the_same_figures() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "tools" / "result.py", "--check"], capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_exists(page: Path) -> None:
    names = [*(item.name for item in dataclasses.fields(DistillConfig)), *ALSO, *SAME, *OTHER]
    ours = {f"--{flag(name)}" for name in names}
    in_code = set(re.findall(r'"(--[a-z][a-z0-9-]+)"', "\n".join(map(text_of, SOURCES))))
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]+)", text_of(page)))
    assert named - ours - in_code - OTHERS == set()


def test_the_messages_of_the_troubleshooting_page_are_the_program_s() -> None:
    """Each message, with X, Y, N, NAME, DIR and numbers standing for anything, is in the code."""
    code = re.sub(r'"\s*(?:#.*)?\n\s*f?"', "", "\n".join(map(text_of, SOURCES)))  # strings in several parts
    code = re.sub(r"\{[^{}]*\}", "@", code)
    first = [line.split("|")[1] for line in text_of(ROOT / "docs" / "troubleshooting.md").splitlines() if "|" in line]
    messages = [message for cell in first for message in re.findall(r"`(.+?)`", cell)]
    shown = {m: re.sub(r"\b(?:X|Y|N|NAME|DIR|datasets|lora_rank|\d+)\b", "@", m).replace("@", "") for m in messages}
    assert len(messages) > 12 and [m for m, words in shown.items() if words not in code.replace("@", "")] == []
