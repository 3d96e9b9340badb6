"""One finished run a session for the tests of what leaves it. Tests must not write into it: they copy it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny import tiny_model
from tiny_runs import small

from mlx_linearard import distill

CARD_OF_BASE = """---
license: apache-2.0
language:
- en
- no
base_model: acme/tiny-llama
library_name: transformers
---
# Tiny
"""


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A run of two steps by YaRN, whose base has a card."""
    folder = tmp_path_factory.mktemp("finished")
    base = tiny_model(folder / "base")
    (base / "README.md").write_text(CARD_OF_BASE)
    distill(small(base, text_file, folder / "run", method="yarn", steps=2))
    return folder / "run"


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
