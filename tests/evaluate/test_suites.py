"""Suites on a tiny model agree with one plain forward pass and with sums by hand, and refuse wrong input."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import PROSE, tiny_model

from mlx_linearard.errors import UserError
from mlx_linearard.evaluate.model import Subject, load_subject, open_directory
from mlx_linearard.evaluate.runner import run_suite
from mlx_linearard.evaluate.suites.choice import Choice, check_choice
from mlx_linearard.evaluate.suites.continuation import split_tokens
from mlx_linearard.evaluate.suites.fidelity import FidelityToReference
from mlx_linearard.evaluate.suites.haystack import Prose
from mlx_linearard.evaluate.suites.lambada import LastWord
from mlx_linearard.evaluate.suites.passkey import BUDGET, Passkey
from mlx_linearard.evaluate.suites.ppl import Perplexity, buckets

ROUNDING = 1e-4  # nats, float32 over three layers
QUESTIONS = [
    {"query": "Question: what is it?\nAnswer:", "choices": ["the best of times", "foolish", "an age"], "gold": 0},
    {"query": "It was the worst", "choices": ["of times", "idea"], "gold": 1},
    {"query": "", "choices": ["no context", "at all"], "gold": 0},
    {"query": "A space at the end ", "choices": ["goes over", "to the choice"], "gold": 1},
]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    path = tiny_model(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=1024)
    return load_subject(open_directory(path), chunk=16)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    path = tiny_model(tmp_path_factory.mktemp("model") / "other", max_position_embeddings=1024, seed=7)
    return load_subject(open_directory(path), chunk=16)


def log_probabilities(subject: Subject, tokens) -> np.ndarray:
    """(T, V) float64 from one forward pass without a cache."""
    logits = np.array(subject.model(mx.array(np.asarray(tokens))[None])[0].astype(mx.float32)).astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def text_tokens(subject: Subject, count: int) -> np.ndarray:
    return np.array(subject.directory.encode(PROSE * 100)[:count], np.int32)


def test_progress_counts_tokens_by_their_work(subject: Subject) -> None:
    reported: list[tuple[int, int]] = []
    run_suite(
        subject,
        Perplexity(text_tokens(subject, 801), (400,)),
        progress=lambda _, done, total: reported.append((done, total)),
    )
    balance = subject.directory.balance
    assert math.isfinite(balance)
    one = 400 + 400**2 / (2 * balance)
    ends = range(16, 401, 16)
    expected = [800 * (before + n + n * n / (2 * balance)) / (2 * one) for before in (0, one) for n in ends]
    assert [total for _, total in reported] == [800] * len(reported) and reported[-1] == (800, 800)
    assert [done for done, _ in reported] == sorted({round(x) for x in expected})
    assert reported[len(ends) // 2][0] < 0.9 * 16 * (len(ends) // 2 + 1)  # the first half of an item is the lesser one


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunks_of_any_size_agree_with_one_forward_pass(subject: Subject, chunk: int) -> None:
    tokens = text_tokens(subject, 101)
    found = Subject(subject.directory, subject.model, chunk).nll(tokens)
    expected = -log_probabilities(subject, tokens[:-1])[np.arange(100), tokens[1:]]
    assert np.abs(found - expected).max() < ROUNDING


def test_perplexity_by_length_and_position(subject: Subject) -> None:
    suite = Perplexity(text_tokens(subject, 1000), (50, 300), budget=600)
    kept, records = run_suite(subject, suite)
    windows = [item.content for item in suite.items(subject.directory, 1024) if len(item.content) == 301]
    assert len(windows) == 2
    nll = np.array([-log_probabilities(subject, w[:-1])[np.arange(300), w[1:]] for w in windows])
    assert math.log(kept["by_length"]["300"]) == pytest.approx(nll.mean(), abs=ROUNDING)
    assert [(b["start"], b["end"]) for b in kept["by_position"]] == [(0, 128), (128, 256), (256, 300)]
    for bucket in kept["by_position"]:
        expected = math.exp(nll[:, bucket["start"] : bucket["end"]].mean())
        assert bucket["perplexity"] == pytest.approx(expected, rel=ROUNDING)
    assert kept["metrics"]["perplexity@50"]["n"] == 12 == sum(r["id"].startswith("50/") for r in records)


def test_a_sliding_window_scores_each_token_once_with_context(subject: Subject) -> None:
    tokens = text_tokens(subject, 161)
    suite = Perplexity(tokens, (100,), budget=60, stride=20)
    kept, records = run_suite(subject, suite)
    assert len(records) == 3
    expected = []
    for start in (0, 20, 40):
        window = tokens[start : start + 101]
        expected += list(-log_probabilities(subject, window[:-1])[np.arange(80, 100), window[81:]])
    assert math.log(kept["metrics"]["perplexity@100"]["value"]) == pytest.approx(np.mean(expected), abs=ROUNDING)


def test_buckets_double_and_cover_the_window() -> None:
    assert buckets(100) == [(0, 100)]
    assert buckets(600) == [(0, 128), (128, 256), (256, 512), (512, 600)]


def test_fidelity_is_the_kl_and_the_agreement_by_definition(subject: Subject, other: Subject) -> None:
    suite = FidelityToReference(text_tokens(subject, 300), 40, other, budget=80)
    kept, _ = run_suite(subject, suite)
    kl, top1, top5 = [], [], []
    for item in suite.items(subject.directory, 1024):
        s, t = (log_probabilities(m, item.content[:-1]) for m in (subject, other))
        kl.append((np.exp(t) * (t - s)).sum(-1).mean())
        top1.append((s.argmax(-1) == t.argmax(-1)).mean())
        firsts = zip(np.argsort(-s)[:, :5].tolist(), np.argsort(-t)[:, :5].tolist(), strict=True)
        top5.append(np.mean([len(set(a) & set(b)) / 5 for a, b in firsts]))
    found = {name: value["value"] for name, value in kept["metrics"].items()}
    assert found["kl"] == pytest.approx(np.mean(kl), abs=ROUNDING) and found["kl"] > 0.01
    assert found["top1"] == pytest.approx(np.mean(top1)) and found["top5"] == pytest.approx(np.mean(top5))
    own, _ = run_suite(other, suite)
    assert own["metrics"]["kl"]["value"] == 0 and own["metrics"]["top5"]["value"] == 1


def test_choices_are_scored_by_their_own_tokens_alone(subject: Subject) -> None:
    kept, records = run_suite(subject, Choice(QUESTIONS))
    for question, record in zip(QUESTIONS, records, strict=True):
        scores = []
        for choice in question["choices"]:
            tokens, count = split_tokens(subject.directory, question["query"], f" {choice}")
            found = log_probabilities(subject, tokens[:-1])[np.arange(len(tokens) - 1), tokens[1:]]
            scores.append(found[len(found) - count :].sum())
        assert np.allclose(record["scores"], scores, atol=10 * ROUNDING)
        lengths = [len(choice) for choice in question["choices"]]
        expected = [int(np.argmax(scores)), int(np.argmax(np.array(scores) / lengths))]
        assert record["decisions"] == expected
        assert record["samples"]["acc_norm"] == (expected[1] == question["gold"])
    share = sum(r["samples"]["acc"] for r in records) / 4
    assert kept["metrics"]["acc"]["value"] == share and kept["metrics"]["acc"]["n"] == 4


def test_spaces_at_the_context_end_belong_to_the_continuation(subject: Subject) -> None:
    assert split_tokens(subject.directory, "A b ", "c") == split_tokens(subject.directory, "A b", " c")
    tokens, count = split_tokens(subject.directory, "", " c")
    assert tokens[0] == 256 and count == 2 == len(tokens) - 1  # the first token stands for the context


def test_the_last_word_is_scored_given_all_before_it(subject: Subject) -> None:
    passages = [{"text": "It was the best of times"}, {"text": "the age of wisdom"}]
    kept, records = run_suite(subject, LastWord(passages))
    tokens = subject.directory.encode(passages[0]["text"])
    found = log_probabilities(subject, tokens[:-1])[np.arange(len(tokens) - 1), tokens[1:]]
    assert records[0]["samples"]["perplexity"] == pytest.approx(-found[-6:].sum(), abs=10 * ROUNDING)
    nats = np.mean([r["samples"]["perplexity"] for r in records])
    assert kept["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(nats))


def test_a_last_word_that_is_greedy_is_counted(subject: Subject) -> None:
    context = subject.directory.encode("It was")
    greedy = subject.greedy(context, 3)
    (_, right), (_, wrong) = subject.continuations([[*context, *greedy], [*context, *greedy[:2], 65]], [3, 3])
    assert right and not wrong and len(greedy) == 3


def test_greedy_decoding_is_the_argmax_of_a_plain_forward_pass(subject: Subject) -> None:
    tokens = subject.directory.encode(PROSE)
    found = subject.greedy(tokens, 5)
    for token in found:
        assert token == log_probabilities(subject, tokens)[-1].argmax()
        tokens = [*tokens, token]


def test_a_pass_key_has_its_depth_and_the_asked_length(subject: Subject) -> None:
    suite = Passkey(Prose(PROSE * 30), (400, 700), depths=(0, 50, 100), samples=2)
    for length in (400, 700):
        for depth in (0, 50, 100):
            tokens, key = suite.prompt(subject.directory, length, depth, 1)
            text = subject.directory.decode(tokens)
            assert 0.98 * length <= len(tokens) + BUDGET <= length
            assert abs(text.index(key) / len(text) - depth / 100) < 0.3
            assert suite.prompt(subject.directory, length, depth, 1) == (tokens, key)
    assert suite.prompt(subject.directory, 400, 50, 0) != suite.prompt(subject.directory, 400, 50, 1)
    kept, records = run_suite(subject, Passkey(Prose(PROSE), (400,), depths=(0, 100), samples=1))
    assert set(kept["grid"]["400"]) == {"0", "100"} and len(records) == 2


# ---------------------------------------------------------------------------------------------------
# What a user can get wrong


@pytest.mark.parametrize(
    ("item", "names"),
    [
        ({"query": "q", "choices": ["a", "b"]}, "no `gold`"),
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "`gold` is 2"),
        ({"query": "q", "choices": ["a", "b"], "gold": True}, "`gold` is True"),
        ({"query": "q", "choices": ["a"], "gold": 0}, "`choices`"),
        ({"choices": ["a", "b"], "gold": 0}, "no `query`"),
    ],
)
def test_an_incomplete_item_is_named(item: dict, names: str) -> None:
    with pytest.raises(UserError, match=f"f.jsonl line 3.*{names}"):
        check_choice(item, "f.jsonl line 3")


def test_items_beyond_the_window_are_refused(subject: Subject) -> None:
    long = [{"query": "x" * 2000, "choices": ["a", "b"], "gold": 0}]
    with pytest.raises(UserError, match=r"item 0 has 2002 tokens and does not fit .* 1024 tokens"):
        run_suite(subject, Choice(long))
    with pytest.raises(UserError, match="--lengths 2048 does not fit"):
        run_suite(subject, Perplexity(text_tokens(subject, 500), (2048,)))
    with pytest.raises(UserError, match="500 tokens, too few for one window of 600"):
        run_suite(subject, Perplexity(text_tokens(subject, 500), (600,)))
    with pytest.raises(UserError, match="--stride 600 is above"):
        run_suite(subject, Perplexity(text_tokens(subject, 500), (400,), stride=600))
    with pytest.raises(UserError, match="passkey at 100: its question alone takes"):
        run_suite(subject, Passkey(Prose(PROSE), (100,)))


def test_the_reference_limits_fidelity(subject: Subject, tmp_path: Path) -> None:
    short = load_subject(open_directory(tiny_model(tmp_path / "short", max_position_embeddings=64)))
    with pytest.raises(UserError, match="do not fit the window of the reference"):
        run_suite(subject, FidelityToReference(text_tokens(subject, 500), 100, short))
