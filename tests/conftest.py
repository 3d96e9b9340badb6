"""Fixtures shared by the tests: one tiny model directory and one text a session."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests need no network, and must not wait for one
os.environ["MLX_LINEARARD_CACHE"] = ""  # a test finds no measurement of another
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent / "convert"))  # converter_models
sys.path.insert(0, str(Path(__file__).parent / "families"))  # family_models
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "recipes"))  # plan
sys.path.insert(0, str(Path(__file__).parent))

from forked import Commands
from tiny import PROSE, tiny_model

# `nohup`, and some schedulers, start programs that ignore a closed terminal; so would the runs of the tests.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float32 Llama; tests must not write into it."""
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 16 thousand characters of prose."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("".join(f"{i}. {PROSE}" for i in range(200)))
    return path


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    """Commands in processes of their own that share one import."""
    server = Commands()
    yield server
    server.close()
