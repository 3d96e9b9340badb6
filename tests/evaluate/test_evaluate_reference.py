"""Scores are those of transformers on torch in float32: item by item, and position by position."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_linearard.convert.default_model import default_model
from tiny import PROSE, tiny_model

from mlx_linearard.data import python_prose, tokenize
from mlx_linearard.evaluate.model import Subject, load_subject, open_directory
from mlx_linearard.evaluate.runner import run_suite
from mlx_linearard.evaluate.suites.choice import Choice
from mlx_linearard.evaluate.suites.lambada import LastWord
from mlx_linearard.evaluate.suites.ppl import Perplexity, buckets

pytestmark = pytest.mark.slow

WORDS = PROSE.split()
LONG = 2048  # tokens of the real model's text
NEAR = 1e-3  # nats, on sums over a continuation, float32 in both
SCALED = {"rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}


@pytest.fixture(scope="module", params=[{}, SCALED], ids=["native", "yarn"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, Any, Any]:
    """One directory as (subject, transformers model, transformers tokenizer)."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    path: Path = tiny_model(tmp_path_factory.mktemp("m") / "tiny", max_position_embeddings=512, **request.param)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return load_subject(open_directory(path), chunk=48), model, tokenizer


def log_probabilities(model: Any, tokens: list[int]) -> np.ndarray:
    """(T - 1,) log-probability of each token after the first, by transformers."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].double()
        chosen = torch.tensor(tokens[1:])[:, None]
        return torch.log_softmax(logits, -1).gather(-1, chosen)[:, 0].numpy()


def questions(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    return [
        {"query": f"Question: {text(5, 30)}?\nAnswer:", "choices": [text(1, 8) for _ in range(4)], "gold": i % 4}
        for i in range(count)
    ]


def test_choice_decides_as_transformers_does_item_by_item(both: tuple[Subject, Any, Any]) -> None:
    subject, model, tokenizer = both
    items = questions(40)
    _, records = run_suite(subject, Choice(items))
    for item, record in zip(items, records, strict=True):
        scores = []
        for choice in item["choices"]:
            context = tokenizer.encode(item["query"], add_special_tokens=False)
            whole = tokenizer.encode(f"{item['query']} {choice}", add_special_tokens=False)
            scores.append(log_probabilities(model, whole)[len(context) - 1 :].sum())
        by_length = [score / len(choice) for score, choice in zip(scores, item["choices"], strict=True)]
        assert np.allclose(record["scores"], scores, atol=NEAR)
        assert record["decisions"] == [int(np.argmax(scores)), int(np.argmax(by_length))]


def test_the_last_word_has_transformers_likelihood(both: tuple[Subject, Any, Any]) -> None:
    subject, model, tokenizer = both
    passages = [{"text": f"{item['query']} {item['choices'][0]}"} for item in questions(10)]
    _, records = run_suite(subject, LastWord(passages))
    for passage, record in zip(passages, records, strict=True):
        context = tokenizer.encode(passage["text"].rpartition(" ")[0], add_special_tokens=False)
        whole = tokenizer.encode(passage["text"], add_special_tokens=False)
        expected = -log_probabilities(model, whole)[len(context) - 1 :].sum()
        assert record["samples"]["perplexity"] == pytest.approx(expected, abs=NEAR)


def test_perplexity_by_position_is_transformers(both: tuple[Subject, Any, Any]) -> None:
    subject, model, tokenizer = both
    tokens = np.array(tokenizer.encode(PROSE * 30, add_special_tokens=False), np.int32)
    suite = Perplexity(tokens, (400,), budget=1200)
    kept, _ = run_suite(subject, suite)
    windows = [item.content.tolist() for item in suite.items(subject.directory, 512)]
    nll = -np.array([log_probabilities(model, window) for window in windows])
    assert len(windows) == 3
    for bucket in kept["by_position"]:
        expected = math.exp(nll[:, bucket["start"] : bucket["end"]].mean())
        assert bucket["perplexity"] == pytest.approx(expected, rel=1e-4)  # the half per cent asked for, and to spare


@pytest.fixture(scope="module")
def smol() -> Subject:
    """The real model: SmolLM2-135M-Instruct in float32."""
    return load_subject(open_directory(default_model()), dtype="float32")


@pytest.fixture(scope="module")
def long_text(smol: Subject) -> np.ndarray:
    """One window of the prose in every Python: `LONG` tokens and the next one."""
    return tokenize(python_prose(), smol.directory.tokenizer, limit=LONG + 1)


def test_smollm2_by_position_is_transformers(smol: Subject, long_text: np.ndarray) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(smol.directory.path, dtype=torch.float32).eval()
    tokens = torch.tensor(long_text.tolist())
    with torch.no_grad():
        hidden = model.model(tokens[None, :-1]).last_hidden_state[0]
        parts = [  # logits of a few positions at a time: all of them would take a gigabyte
            torch.nn.functional.cross_entropy(model.lm_head(h).double(), t, reduction="none")
            for h, t in zip(hidden.split(256), tokens[1:].split(256), strict=True)
        ]
    nll = torch.cat(parts).numpy()
    kept, _ = run_suite(smol, Perplexity(long_text, (LONG,), budget=LONG))
    assert len(kept["by_position"]) == 5
    for bucket in kept["by_position"]:
        expected = math.exp(nll[bucket["start"] : bucket["end"]].mean())
        assert bucket["perplexity"] == pytest.approx(expected, rel=0.005), bucket


def test_smollm2_in_chunks_is_the_whole_prefill(smol: Subject, long_text: np.ndarray) -> None:
    logits = smol.model(mx.array(long_text[:-1])[None])[0]  # one forward pass without a cache
    chosen = mx.take_along_axis(logits, mx.array(long_text[1:])[:, None], axis=-1)[:, 0]
    whole = np.array(mx.logsumexp(logits, axis=-1) - chosen, np.float64)
    chunked = Subject(smol.directory, smol.model, 500).nll(long_text).astype(np.float64)
    for start, end in buckets(LONG):
        assert chunked[start:end].mean() == pytest.approx(whole[start:end].mean(), abs=1e-4)
    assert np.abs(chunked - whole).max() < 1e-3  # nats, of any one token
