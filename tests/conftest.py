"""Fixtures shared by the tests: one tiny model directory and one text a session."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # on CUDA, float32 products are exact to float32; read when mlx starts

import mlx.core as mx

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests need no network, and must not wait for one
os.environ["MLX_LINEARARD_CACHE"] = ""  # a test finds no measurement of another
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent / "convert"))  # converter_models
sys.path.insert(0, str(Path(__file__).parent / "families"))  # family_models
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "recipes"))  # plan
sys.path.insert(0, str(Path(__file__).parent))

from forked import Commands
from tiny import PROSE, tiny_model

ON_CPU = mx.default_device().type == mx.DeviceType.cpu
if ON_CPU:  # each function that mlx-lm compiles costs half a second of a C++ compiler; processes of tests inherit this
    os.environ["MLX_DISABLE_COMPILE"] = "1"
    mx.disable_compile()

# `nohup`, and some schedulers, start programs that ignore a closed terminal; so would the runs of the tests.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def lighter_runs() -> Iterator[None]:
    """Runs in this process write a few words of sample text, and their files need not survive a power cut.

    Commands in processes of their own do both as they do for users. The garbage collector looks through no module.
    """
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_linearard.evaluate.writing.ANSWER", 8)
        patch.setattr("mlx_linearard.files.writing._sync", lambda path: None)
        yield


@pytest.fixture
def compiling() -> Iterator[None]:
    """mx.compile compiles, on a CPU too."""
    mx.enable_compile()
    yield
    if ON_CPU:
        mx.disable_compile()


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
