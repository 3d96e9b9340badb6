"""Several sequences at a time against one at a time: families, padding, chunks, quantized weights, stops."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm import batch_generate
from tiny import PROSE, tiny_model

from mlx_linearard.evaluate import generation
from mlx_linearard.evaluate.model import Question, Subject, load_subject, open_directory
from mlx_linearard.evaluate.passes import packed
from mlx_linearard.evaluate.suites.continuation import Request
from mlx_linearard.models.layers import hidden_at

NATS = 1e-4  # of a log-likelihood, float32 over three layers
YARN = {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
FAMILIES = {
    "llama": {},
    "one key head": {"num_key_value_heads": 1},
    "yarn": {"rope_scaling": YARN},
    "quantized": {"bits": 4},
    "qwen3": {"model_type": "qwen3", "attention_bias": False},
    "gemma2": {"model_type": "gemma2", "query_pre_attn_scalar": 16, "sliding_window": 40},
    "gemma3_text": {"model_type": "gemma3_text", "query_pre_attn_scalar": 16, "sliding_window": 24,
                    "sliding_window_pattern": 2, "rope_local_base_freq": 10000.0},
    "olmo2": {"model_type": "olmo2", "attention_bias": False},
    "phi3": {"model_type": "phi3"},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def subject_of(folder: Path, name: str = "llama", *, few_shapes: bool = False, **sizes: int) -> Subject:
    path = folder / name.replace(" ", "_")
    if not path.exists():
        tiny_model(path, max_position_embeddings=1024, **FAMILIES[name])
    subject = load_subject(open_directory(path), **sizes)
    subject.__dict__["passes"] = replace(subject.passes, few_shapes=few_shapes)
    return subject


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def requests() -> list[Request]:
    """Items of two to four sequences or of one: common beginnings of 0 to 190 tokens, endings of 1 to 90."""
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(256) for _ in range(count)]

    items = []
    for count, shared in [(4, 40), (2, 160), (3, 3), (1, 60), (1, 190), (2, 0), (4, 41), (3, 12), (1, 2), (2, 64)]:
        first, lengths = tokens(shared), [rng.choice([1, 2, 7, 30, 80]) for _ in range(count)]
        bodies = [tokens(rng.randrange(1, 10) + length) for length in lengths]
        items.append(Request([first + body for body in bodies], lengths, {}))
    return items


def by_definition(subject: Subject, tokens: Sequence[int], count: int) -> tuple[float, bool]:
    """Log-likelihood of the last `count` tokens, and whether they are the first choices: one plain forward pass."""
    logits = np.array(subject.model(mx.array(tokens[:-1])[None])[0, -count:].astype(mx.float32)).astype(np.float64)
    top = logits.max(-1, keepdims=True)
    logs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    targets = np.array(tokens[-count:])
    return logs[np.arange(count), targets].sum(), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_each_sequence_alone(folder: Path, name: str, few_shapes: bool) -> None:
    subject, items = subject_of(folder, name, few_shapes=few_shapes), requests()
    for item, scores in zip(items, subject.scores(items), strict=True):
        for tokens, count, (found, first) in zip(item.sequences, item.lengths, scores, strict=True):
            expected, chosen = by_definition(subject, tokens, count)
            assert found == pytest.approx(expected, abs=NATS * max(1, abs(expected) / 10)) and first == chosen


@pytest.mark.parametrize("sizes", [{"chunk": 16}, {"chunk": 100}, {"batch_size": 1}, {"batch_size": 3}])
def test_scores_do_not_depend_on_the_sizes_of_passes(folder: Path, sizes: dict[str, int]) -> None:
    items = requests()
    expected = list(subject_of(folder).scores(items))
    found = list(subject_of(folder, **sizes).scores(items))
    for a, b in zip(expected, found, strict=True):
        assert np.allclose([x for x, _ in a], [x for x, _ in b], rtol=1e-5, atol=NATS)
        assert [x for _, x in a] == [x for _, x in b]


def test_families_that_fail_on_batches_are_read_one_at_a_time(folder: Path) -> None:
    passes = {name: subject_of(folder, name).passes for name in FAMILIES}
    able = {name: name != "gemma2" for name in FAMILIES}  # mlx-lm 0.32.2's takes no mask for each sequence
    assert {name: own.batches for name, own in passes.items()} == able
    assert {name: own.shares for name, own in passes.items()} == able


def test_a_resumed_item_has_the_same_digits(folder: Path) -> None:
    """An item is scored with the same others, whether or not they are measured already."""
    subject, items = subject_of(folder, chunk=100), requests()
    every = list(subject.scores(items))
    for wanted in ([i == 4 for i in range(10)], [i in (0, 7, 9) for i in range(10)], [False] * 10):
        assert list(subject.scores(items, wanted)) == [one for one, asked in zip(every, wanted, strict=True) if asked]


def test_first_choices_are_seen_in_a_batch(folder: Path) -> None:
    subject = subject_of(folder)
    context = subject.directory.encode(PROSE)
    right = subject.greedy(context, 3)
    wrong = [*right[:2], (right[2] + 1) % 256]
    items = [Request([[*context, *right], [*context, *wrong]], [3, 3], {}), Request([[*context[9:], *wrong]], [3], {})]
    assert [[first for _, first in scores] for scores in subject.scores(items)] == [[True, False], [False]]


def prompts(subject: Subject, lengths: Sequence[int]) -> list[list[int]]:
    text = subject.directory.encode(PROSE * 20)
    return [text[i : i + length] for i, length in enumerate(lengths)]


@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_each_prompt_alone(folder: Path, name: str, few_shapes: bool) -> None:
    """Prompts of similar lengths are read together, others are not; the answers are the argmax of a plain pass."""
    subject = subject_of(folder, name, few_shapes=few_shapes, chunk=64)
    given = prompts(subject, [100, 97, 104, 30, 31, 200, 1])
    found = list(subject.answers(Question(prompt, 6) for prompt in given))
    alone = [subject.greedy(prompt, 6) for prompt in given]
    assert found == alone
    for prompt, answer in zip(given, found, strict=True):
        logits = subject.model(mx.array([*prompt, *answer])[None])[0, len(prompt) - 1 : -1]
        assert mx.argmax(logits, axis=-1).tolist() == answer


def test_answers_are_those_of_mlx_lm(folder: Path) -> None:
    subject = subject_of(folder)
    given = prompts(subject, [200, 190, 195, 40])
    theirs = batch_generate(subject.model, subject.directory.tokenizer, given, max_tokens=8)
    ours = [subject.directory.decode(answer) for answer in subject.answers(Question(p, 8) for p in given)]
    assert ours == theirs.texts


def test_each_answer_stops_for_itself(folder: Path) -> None:
    """At an end token, at its budget, or once it is enough, while the others of the batch go on."""
    subject = subject_of(folder)
    given = prompts(subject, [100, 101, 102, 103, 104])
    whole = [subject.greedy(prompt, 9) for prompt in given]
    four = len(subject.directory.decode(whole[1][:4]))
    enough = [None, lambda text: len(text) >= four, None, lambda text: True, None]
    budgets = [9, 9, 2, 9, 5]
    asked = [Question(p, b, e) for p, b, e in zip(given, budgets, enough, strict=True)]
    assert list(subject.answers(asked)) == [whole[0], whole[1][:4], whole[2][:2], whole[3][:1], whole[4][:5]]
    end = whole[4][3]
    subject.directory.tokenizer.eos_token_ids = {*subject.directory.tokenizer.eos_token_ids, end}
    until = [answer[: answer.index(end)] if end in answer else answer for answer in whole]
    assert list(subject.answers(Question(p, 9) for p in given)) == until and len(until[4]) < 9


def test_prompts_are_read_only_when_their_batch_begins(folder: Path) -> None:
    subject = subject_of(folder, batch_size=2)
    made: list[int] = []

    def questions():
        for i, prompt in enumerate(prompts(subject, [50] * 6)):
            made.append(i)
            yield Question(prompt, 2)

    answers = subject.answers(questions())
    next(answers)
    assert made == [0, 1, 2]


def test_a_batch_fits_its_memory(folder: Path) -> None:
    """Rows are added while their caches fit; the largest cache counts for those to come."""
    subject = subject_of(folder)
    given = [generation.Prompt(prompt, 3) for prompt in prompts(subject, [200] * 6)]
    sizes: list[int] = []
    own = generation._answers

    def watch(passes, batch, cache, ends):
        sizes.append(len(batch))
        return own(passes, batch, cache, ends)

    one = 3 * 2 * 2 * 256 * 16 * 4  # layers, keys and values, heads, positions, width, float32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "_answers", watch)
        for held, expected in [(3 * one + 99, [3, 3]), (one // 2, [1] * 6), (4 * one + 99, [4, 2])]:
            sizes.clear()
            list(generation.generate(replace(subject.passes, cache_bytes=held), given, set()))
            assert sizes == expected
        sizes.clear()
        list(generation.generate(replace(subject.passes, batch=450), given, set()))
        assert sizes == [2, 2, 2]


class Small(nn.Module):
    """A model on a device whose memory does not hold a pass over more than `most` tokens."""

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.inner, self.most = model, most

    @property
    def layers(self) -> list[nn.Module]:
        return self.inner.layers

    def __call__(self, tokens: mx.array, cache: object = None) -> mx.array:
        if tokens.size > self.most:
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
        return self.inner(tokens, cache=cache)


def test_batches_become_smaller_if_the_memory_is_full(folder: Path) -> None:
    subject = subject_of(folder)
    items, given = requests(), prompts(subject, [30, 31, 30, 29, 30, 31, 30])
    expected = list(subject.scores(items)), list(subject.answers(Question(p, 4) for p in given))
    ticks: list[int] = []
    small = replace(subject, model=Small(subject.model, 130))
    for found, right in zip(small.scores(items), expected[0], strict=True):
        assert np.allclose([x for x, _ in found], [x for x, _ in right], rtol=1e-5, atol=NATS)
    own = generation._Step.after

    def full(passes: object, cache: object, last: mx.array) -> generation._Step:
        if last.size > 3:
            raise RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory")
        return own(passes, cache, last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation._Step, "after", full)
        assert list(subject.answers((Question(p, 4) for p in given), ticks.append)) == expected[1]
        assert sum(ticks) == sum(len(p) - 1 for p in given)  # prompts that are read again do not count again
        patch.setattr(generation._Step, "after", lambda *any: full(None, None, mx.zeros(9)))
        with pytest.raises(RuntimeError, match="out of memory"):
            list(subject.answers(Question(p, 4) for p in given))


def test_few_shapes_are_used_for_many_sizes(folder: Path) -> None:
    passes = subject_of(folder, few_shapes=True, chunk=64).passes
    sizes = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 7: 8, 9: 12, 13: 16, 48: 48, 49: 64, 100: 128}
    assert {size: passes.rounded(size) for size in sizes} == sizes
    assert [passes.width(n) for n in (1, 8, 9)] == [8, 8, 12]
    assert next(passes.packed([5, 6, 7, 8, 33], int)) == [5, 6, 7, 8]  # eight each; the fifth would need 48
    shapes: list[tuple[int, ...]] = []

    class Watched(nn.Module):
        def __call__(self, tokens: mx.array, cache: object = None) -> mx.array:
            shapes.append(tokens.shape)
            return passes.model(tokens, cache=cache)

    for length in range(130, 160):
        replace(passes, model=Watched()).prefill(passes.new_cache(), [3] * length)
    assert set(shapes) == {(1, 64), (1, 8), (1, 12), (1, 16), (1, 24), (1, 32)}


def test_things_are_packed_by_length() -> None:
    lengths = [5, 1, 9, 2, 2, 30, 3]
    assert list(packed(lengths, int, 12, 3)) == [[1, 2], [2, 3], [5], [9], [30]]  # 5 is much longer than 2 and 3
    assert list(packed(lengths, int, 40, 9)) == [[1, 2, 2, 3, 5], [9], [30]]
    assert list(packed([10, 11, 12, 13, 14], int, 40, 9)) == [[10, 11, 12], [13, 14]]
    assert [len(batch) for batch in packed([1] * 10, int, 1000, 4)] == [4, 4, 2]


class Odd(nn.Module):
    """A model whose layers are not in a list."""

    model_type = "odd"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    @property
    def layers(self) -> tuple[object, ...]:
        return (object(),)

    def __call__(self, tokens: mx.array, cache: object = None) -> mx.array:
        return self.inner(tokens, cache=cache)


def test_hidden_states_at_positions_give_the_logits_there(folder: Path) -> None:
    model = subject_of(folder).model
    tokens, positions = mx.array(np.arange(24).reshape(2, 12)), mx.array([3, 11, 12, 23])
    expected = np.array(model(tokens)).reshape(24, -1)[[3, 11, 12, 23]]
    for one in (model, Odd(model)):
        hidden, head = hidden_at(one, tokens, positions)
        assert np.allclose(np.array(head(hidden)), expected, atol=1e-5)
    assert hidden.shape[-1] == expected.shape[-1]  # without a list of layers these are the logits themselves
    assert hidden_at(model, tokens, positions)[0].shape == (1, 4, 64)
