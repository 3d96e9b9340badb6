"""GGUF files in llama.cpp itself: the same greedy tokens and log-probabilities beyond the old window."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import converter_models as tiny
import mlx.core as mx
import numpy as np
import pytest
from mlx_linearard.convert.gguf_write import to_gguf
from mlx_linearard.convert.hf import scale
from mlx_linearard.convert.served import verify_served
from mlx_lm.utils import load_model
from test_gguf_write import model

pytestmark = pytest.mark.slow
pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

NEW = 24  # tokens that are generated
ROUNDING = 0.02  # nats; llama.cpp computes attention in half precision
PROGRAM = """
import json, sys, urllib.request
import xllamacpp as x
path, window = sys.argv[1], int(sys.argv[2])
ids, new = json.load(sys.stdin)
options = x.CommonParams()
options.model.path, options.n_ctx, options.n_parallel, options.warmup = path, window, 1, False
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
options.cache_type_k = options.cache_type_v = x.ggml_type.GGML_TYPE_F32
server = x.Server(options)
found = []
for _ in range(new):
    prompt = ids + [token for token, _ in found]
    body = {"prompt": prompt, "n_predict": 1, "temperature": 0.0, "n_probs": 1, "return_tokens": True}
    request = urllib.request.Request(server.listening_address + "/completion", json.dumps(body).encode())
    answer = json.load(urllib.request.urlopen(request))
    entries = answer.get("completion_probabilities")  # none for a part of a character
    found.append([answer["tokens"][0], entries[0]["logprob"] if entries else None])
print("ANSWER", json.dumps(found))
"""


def llama_cpp(path: Path, ids: list[int], window: int) -> list[tuple[int, float | None]]:
    """llama.cpp's greedy tokens after `ids` with their log-probabilities, as far as it gives them."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), str(window)],
        input=json.dumps([ids, NEW]),
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, done.stderr[-2000:]
    return [(token, logprob) for token, logprob in json.loads(lines[0].removeprefix("ANSWER "))]


def ours(directory: Path, ids: list[int], tokens: list[int]) -> np.ndarray:
    """Stock mlx-lm's log-probabilities (T, V) of what follows `ids` and each of `tokens` but the last."""
    loaded, _ = load_model(directory)
    logits = np.array(loaded(mx.array([[*ids, *tokens]]))[0, len(ids) - 1 : -1].astype(mx.float32), np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def distance(found: list[tuple[int, float | None]], expected: np.ndarray) -> float:
    """The largest difference of log-probabilities."""
    known = [(row, token, logprob) for row, (token, logprob) in enumerate(found) if logprob is not None]
    assert len(known) > NEW // 3
    return max(abs(logprob - expected[row, token]) for row, token, logprob in known)


CASES = [
    (kind, method)
    for kind in ("llama", "mistral", "qwen2", "qwen3")
    for method in (None, "linear", "yarn", "ntk", "llama3")
    if method != "llama3" or kind in ("llama", "mistral")
]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_llama_cpp_computes_the_same_beyond_the_old_window(tmp_path: Path, kind: str, method: str | None) -> None:
    settings: dict[str, Any] = {"sliding_window": None} if kind == "mistral" else {}
    base = model(tmp_path / "base", kind, num_hidden_layers=4, **settings)
    scaled = scale(base, tmp_path / "scaled", method=method, factor=4.0) if method else base
    ids = tiny.ids(200 if method else 40, seed=3)[0]
    ids = np.minimum(ids, 260).tolist()  # ids that the tokenizer has
    found = llama_cpp(to_gguf(scaled, tmp_path / "out.gguf"), ids, 256)
    tokens = [token for token, _ in found]
    expected = ours(scaled, ids, tokens)
    assert distance(found, expected) < ROUNDING and len(found) == NEW
    assert (expected.max(-1) - expected[np.arange(NEW), tokens] < ROUNDING).all()  # the same greedy tokens, or a tie
    if method:  # the same check would find a scaling that is not applied
        assert distance(found, ours(base, ids, tokens)) > 5 * ROUNDING


SERVER = """
import sys
import xllamacpp as x
options = x.CommonParams()
options.model.path, options.n_ctx, options.n_parallel, options.warmup = sys.argv[1], 256, 1, False
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
server = x.Server(options)
print("AT", server.listening_address, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def serving(path: Path) -> Iterator[str]:
    """The address of llama.cpp's own server while the block runs."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", SERVER, str(path)], text=True, **pipes) as process:
        assert process.stdin and process.stdout
        yield next(line for line in process.stdout if line.startswith("AT ")).split()[1]
        process.stdin.close()
        process.wait(30)


def test_verify_served_asks_llama_cpp(tmp_path: Path) -> None:
    """Live for the GGUF export, and not live for a file of the same weights without the scaling."""
    base = model(tmp_path / "base", num_hidden_layers=4)
    plain_text_only(base)
    yarn = scale(base, tmp_path / "yarn", method="yarn", factor=4.0)
    with serving(to_gguf(yarn, tmp_path / "yarn.gguf")) as url:
        assert verify_served(url, yarn).live
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    with serving(to_gguf(base, tmp_path / "base.gguf")) as url:
        result = verify_served(url, yarn)
    assert not result.live and "as if there were no scaling" in result.reason


def plain_text_only(directory: Path) -> None:
    """Make the model prefer ASCII characters: llama.cpp names no parts of other characters."""
    path = directory / "model.safetensors"
    arrays = dict(mx.load(str(path)))
    vocab = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    ascii_ids = {index for token, index in vocab.items() if len(token) == 1 and token.isascii()}
    kept = mx.array([float(index in ascii_ids) for index in range(tiny.VOCAB)])
    arrays["lm_head.weight"] = arrays["lm_head.weight"] * kept[:, None]
    mx.eval(arrays)
    mx.save_safetensors(str(path), arrays)
