"""First tokens, end tokens and token borders follow the tokenizer and generation_config.json."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import PROSE, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from mlx_linearard.cli import run_command
from mlx_linearard.data import tokenize, windows
from mlx_linearard.errors import UserError
from mlx_linearard.evaluate.__main__ import run
from mlx_linearard.evaluate.api import fidelity_to, multiple_choice, perplexity
from mlx_linearard.evaluate.held_out import measure
from mlx_linearard.evaluate.model import Subject, load_subject, open_directory
from mlx_linearard.evaluate.suites.continuation import split_tokens
from mlx_linearard.models.pair import load_pair

ROUNDING = 1e-4
BOS, EOS = 256, 257
GEMMA = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "query_pre_attn_scalar": 16,
    "num_hidden_layers": 6,
    "sliding_window": 512,
    "rope_theta": 1e6,
    "hidden_activation": "gelu_pytorch_tanh",
}


def with_bos(folder: Path) -> Path:
    """Make the tokenizer put <s> before a text, as Llama 3's does."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], pair=["<s>", "$A", "<s>:1", "$B:1"], special_tokens=[("<s>", BOS)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(open_directory(tiny_model(tmp_path_factory.mktemp("m") / "plain")), chunk=16)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(open_directory(with_bos(tiny_model(tmp_path_factory.mktemp("m") / "bos"))), chunk=16)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    path = with_bos(tiny_model(tmp_path_factory.mktemp("m") / "other", seed=5))
    return load_subject(open_directory(path), chunk=16)


def log_probabilities(model: Any, tokens: list[int]) -> np.ndarray:
    logits = np.array(model(mx.array(tokens)[None])[0].astype(mx.float32)).astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def text_windows(subject: Subject, length: int) -> list[list[int]]:
    """The four windows of a budget of four lengths, without a first token."""
    tokens = tokenize(
        [PROSE * 60], subject.directory.tokenizer, limit=4 * max(4 * length, subject.directory.window) + 1
    )
    return windows(tokens, length, 4).tolist()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(PROSE * 60)
    return path


def expected_nats(subject: Subject, before: list[int], length: int = 64) -> float:
    nats = []
    for window in text_windows(subject, length):
        found = log_probabilities(subject.model, [*before, *window[:-1]])[len(before) :]
        nats.append(-found[np.arange(length), window[1:]].mean())
    return float(np.mean(nats))


def test_perplexity_reads_the_first_token_before_each_window(subject: Subject, plain: Subject, text: Path) -> None:
    for model, before in ((subject, [BOS]), (plain, [])):
        found = perplexity(model, text, lengths=[64], tokens=256)["by_length"]["64"]
        assert math.log(found) == pytest.approx(expected_nats(model, before), abs=ROUNDING)
    assert abs(expected_nats(subject, [BOS]) - expected_nats(subject, [])) > 10 * ROUNDING


def test_gemma_always_has_its_first_token(tmp_path: Path, text: Path) -> None:
    model = load_subject(open_directory(tiny_model(tmp_path / "gemma", **GEMMA)))
    found = perplexity(model, text, lengths=[64], tokens=256)["by_length"]["64"]
    assert math.log(found) == pytest.approx(expected_nats(model, [BOS]), abs=ROUNDING)
    assert model.directory.encode("hi")[0] == BOS


def test_fidelity_reads_the_first_token_in_both_models(subject: Subject, other: Subject, text: Path) -> None:
    found = fidelity_to(other, subject, text, lengths=[64], tokens=256)["metrics"]
    kl, top1 = [], []
    for window in text_windows(subject, 64):
        s, t = (log_probabilities(m.model, [BOS, *window[:-1]])[1:] for m in (subject, other))
        kl.append((np.exp(t) * (t - s)).sum(-1).mean())
        top1.append((s.argmax(-1) == t.argmax(-1)).mean())
    assert found["kl"]["value"] == pytest.approx(np.mean(kl), abs=ROUNDING)
    assert found["top1"]["value"] == pytest.approx(np.mean(top1))


def test_held_out_rows_read_the_first_token(subject: Subject, plain: Subject) -> None:
    for model, before in ((subject, [BOS]), (plain, [])):
        pair = load_pair(model.directory.path, method="linear", factor=2.0, lora_rank=2)
        cut = np.array(text_windows(model, 64), np.int32)
        native, scaled = measure(pair, {64: cut}, native=True, workspace_bytes=1 << 24)
        assert math.log(native.perplexity[64]) == pytest.approx(expected_nats(model, before), abs=ROUNDING)
        kl = []
        for window in cut.tolist():
            t, s = (log_probabilities(m, [*before, *window[:-1]])[len(before) :] for m in (pair.teacher, pair.student))
            kl.append((np.exp(t) * (t - s)).sum(-1).mean())
        assert scaled.kl == pytest.approx(np.mean(kl), abs=ROUNDING) and scaled.kl > 10 * ROUNDING


def test_choices_read_the_first_token_once(subject: Subject) -> None:
    a, b = subject.directory.encode_plain("ab")
    assert subject.directory.encode("ab") == [BOS, a, b]
    assert subject.directory.encode("<s>ab") == [BOS, a, b]  # not twice
    assert split_tokens(subject.directory, "a", "b") == ([BOS, a, b], 1)
    tokens, count = split_tokens(subject.directory, "", " b")
    assert tokens[0] == BOS and count == len(tokens) - 1 == 2


# ---------------------------------------------------------------------------------------------------
# Borders


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Merges across words: ": y" after "Q:" is one token."""
    path = tiny_model(tmp_path_factory.mktemp("m") / "merging", vocab_size=264)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"Ġy": 256, ":Ġy": 257, "Q:": 258, "es": 259}
    merges = [("Ġ", "y"), (":", "Ġy"), ("Q", ":"), ("e", "s")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    return load_subject(open_directory(path), chunk=16)


def test_a_token_across_the_border_does_not_count(merging: Subject) -> None:
    """As in lm-evaluation-harness: first the tokens of the context alone, then the rest of the joined text's tokens."""
    directory = merging.directory
    context, whole = directory.encode("aQ:"), directory.encode("aQ: yes")
    assert len(context) == 2 and len(whole) == 4 and whole[:2] != context  # "a", "Q:" and "a", "Q", ": y", "es"
    tokens, count = split_tokens(directory, "aQ:", " yes")
    assert tokens == [*context, *whole[2:]] and count == 2
    items = [{"query": "aQ:", "choices": ["yes", "no"], "gold": 0}, {"query": "Q", "choices": [": y", "x"], "gold": 0}]
    entry = multiple_choice(merging, items)
    assert entry["metrics"]["acc"]["n"] == 2
    scores = []
    for choice in (" yes", " no"):
        joined = directory.encode("aQ:" + choice)
        tokens = [*context, *joined[len(context) :]]
        found = log_probabilities(merging.model, tokens[:-1])[np.arange(len(tokens) - 1), tokens[1:]]
        scores.append(found[len(context) - 1 :].sum())
    first = merging.continuations(*zip(*(split_tokens(directory, "aQ:", c) for c in (" yes", " no")), strict=True))
    assert [score for score, _ in first] == pytest.approx(scores, abs=10 * ROUNDING)


def test_a_continuation_inside_one_token_still_counts(merging: Subject) -> None:
    tokens, count = split_tokens(merging.directory, "Q", ":")
    assert tokens == [merging.directory.prefix_token(), 258] and count == 1


# ---------------------------------------------------------------------------------------------------
# End tokens


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ([257, 10], 257, {257, 10}),
        (10, 257, {257, 10}),
        (None, [257, 11], {257, 11}),
        ([], 12, {257}),
        ([10], [11, 12], {257, 10}),
    ],
)
def test_generation_stops_where_mlx_lm_stops(tmp_path: Path, generation: Any, config: Any, ends: set[int]) -> None:
    from mlx_lm import load

    path = tiny_model(tmp_path / "m", eos_token_id=config)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    tokenizer = open_directory(path).tokenizer
    assert set(tokenizer.eos_token_ids) == ends
    if generation != []:  # mlx-lm takes an empty list for none
        assert set(load(str(path))[1].eos_token_ids) == ends


def test_each_end_token_ends_the_answer(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m")
    prompt = load_subject(open_directory(path)).directory.encode(PROSE)
    whole = load_subject(open_directory(path)).greedy(prompt, 8)
    stop = next(token for token in whole if token != whole[0])
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, stop]}))
    assert load_subject(open_directory(path)).greedy(prompt, 8) == whole[: whole.index(stop)]


@pytest.mark.parametrize("value", ["</s>", [257, "10"], [True], 1.5, {"id": 3}])
def test_end_tokens_must_be_ids(tmp_path: Path, value: Any) -> None:
    path = tiny_model(tmp_path / "m")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id must be"):
        open_directory(path)


# ---------------------------------------------------------------------------------------------------
# Tokens that the model does not have


def test_a_first_token_beyond_the_embedding_is_refused(tmp_path: Path, text: Path, capsys) -> None:
    """<s> is token 256 of a model that has 256 embeddings."""
    short = tiny_model(tmp_path / "short", vocab_size=256, bos_token_id=0, eos_token_id=1)
    items = tmp_path / "items.jsonl"
    items.write_text('{"query": "", "choices": ["a", "b"], "gold": 0}\n')
    out = tmp_path / "out.json"
    choice = ["--model", str(short), "--suite", "choice", "--data", str(items), "--out", str(out)]
    with_bos(shutil.copytree(short, tmp_path / "bos"))
    ppl = [
        "--model",
        str(tmp_path / "bos"),
        "--suite",
        "ppl",
        "--data",
        str(text),
        "--lengths",
        "32",
        "--out",
        str(out),
    ]
    for arguments in (choice, ppl):
        assert run_command(lambda given=arguments: run(given)) == 2
        assert "makes token 256, but the model has only 256 embeddings" in capsys.readouterr().err


@pytest.mark.parametrize("number", [258, 5000, 100_000_000, 2**32 - 1])
def test_a_token_beyond_the_embedding_is_refused(tmp_path: Path, text: Path, number: int, capsys) -> None:
    path = tiny_model(tmp_path / "m")
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["vocab"]["w"] = number
    (path / "tokenizer.json").write_text(json.dumps(content))
    items = tmp_path / "items.jsonl"
    items.write_text('{"query": "where", "choices": ["a", "b"], "gold": 0}\n')
    out = tmp_path / "out.json"
    for suite, data in (("ppl", text), ("choice", items), ("passkey", text)):
        arguments = ["--model", str(path), "--suite", suite, "--data", str(data), "--lengths", "100", "--out", str(out)]
        assert run_command(lambda given=arguments: run(given)) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and f"makes token {number}, " in lines[0]
    assert not out.exists()
