"""GGUF files in llama.cpp itself: the same greedy tokens and log-probabilities beyond the old window."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import converter_models as tiny
import mlx.core as mx
import numpy as np
import pytest
from mlx_linearard.convert.gguf_write import to_gguf
from mlx_linearard.convert.hf import scale
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
