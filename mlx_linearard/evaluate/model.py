"""A model under evaluation: stock mlx-lm with a KV cache, which reads prompts in chunks.

A prompt of any length takes the memory of its KV cache and of one chunk. Logits exist for one chunk only, and are
not computed if nothing needs them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..data import Document, check_ids, encode, first_token, tokenize, tokenizer_errors
from ..errors import UserError
from ..files import TOKENIZER_FILES
from ..machine import free_memory, on_gpu
from ..models.directory import check_config, check_model_dir, resolve
from ..models.pair import load_frozen
from ..models.shape import Shape
from ..models.tokenizer import check_tokenizer, tokenizer_of
from ..models.weights import hash_of_model, weight_files
from ..ops.logits import token_nll
from ..ops.row_kernel import on_cuda
from ..ops.tiling import FLOAT32
from ..rope import native_window, normalise
from .generation import Prompt, generate
from .passes import LOGITS_BYTES, SCORES_BYTES, Passes, Tick, are_finite, itself
from .scoring import Continuations, Score, score

CHUNK, GPU_CHUNK, CUDA_CHUNK = 512, 4096, 16384  # tokens per forward pass: enough to fill the device
ROWS, GPU_ROWS, CUDA_ROWS = 64, 256, 2048  # sequences measured together at most
GROUP, CUDA_GROUP = 4, 16  # passes: items of about as many tokens are sorted by length and scored together
BATCH, GPU_BATCH = 8192, 1 << 20  # tokens of prompts that are read together: what an interruption loses on a CPU
CACHE_SHARE, CUDA_CACHE_SHARE = 0.25, 0.4  # parts of free memory for the KV caches of prompts read together
SCORES_SHARE = 1 / 16  # the part of free memory for attention scores, if that is more than SCORES_BYTES
PROBE = "It was 3:45 on a naïve Sunday;\n\n  the “window” held 1234 tokens."  # tokenizers are compared on this text


@dataclass(frozen=True)
class Directory:
    """A model directory before its weights are loaded: enough to choose and check items."""

    label: str
    path: Path
    config: dict[str, Any]
    tokenizer: Any

    @property
    def window(self) -> int:
        try:
            return native_window(self.config)
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from None

    @property
    def unscaled_window(self) -> int:
        """The window before the scaling that the config states; the window if it states none."""
        try:
            scaling = normalise(self.config).get("rope_scaling") or {}
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from None
        original = scaling.get("original_max_position_embeddings") or self.window / scaling.get("factor", 1.0)
        return min(self.window, int(original))

    @property
    def balance(self) -> float:
        """The number of context tokens at which attention costs as much as the layers' weights; inf if unknown."""
        try:
            shape = Shape.of(self.config)
            return shape.block_weights / (2 * shape.layers * shape.heads * shape.head_dim)
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            return math.inf

    @functools.cached_property
    def first(self) -> int | None:
        """The token that a text must begin with, if there is one (see `first_token`)."""
        first = first_token(self.tokenizer, self.config)
        check_ids([] if first is None else [first], self.config, self.path)
        return first

    @property
    def heads(self) -> int:
        """The number of query heads of a layer; 1 if unknown."""
        try:
            return Shape.of(self.config).heads
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            return 1

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, after the first token if there is one."""
        return [*self.before(ids := self.encode_plain(text)), *ids]

    def encode_plain(self, text: str) -> list[int]:
        """The tokens of `text` alone; UserError if the model has no embedding for a token."""
        ids = encode(self.tokenizer, text)
        check_ids(ids, self.config, self.path)
        return ids

    def before(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        """The tokens to put before a text of tokens `ids`: the first token, unless they begin with it."""
        return [] if self.first is None or (len(ids) and ids[0] == self.first) else [self.first]

    def stream(self, documents: Iterable[Document], limit: int) -> np.ndarray:
        """The first `limit` tokens of documents, without the first token; UserError if one has no embedding."""
        tokens = tokenize(documents, self.tokenizer, limit=limit)
        check_ids(tokens, self.config, self.path)
        return tokens

    def documents(self, documents: Iterable[Document], length: int, limit: int) -> list[np.ndarray]:
        """The tokens of documents, at most `length` x 4 of each and `limit` in all; see `stream`."""
        kept: list[np.ndarray] = []
        for document in documents:
            kept.append(self.stream([document], 4 * length))
            if sum(map(len, kept)) >= limit:
                break
        return kept

    def prefix_token(self) -> int:
        """The token before a text without context: the first token, or else the end-of-text token."""
        for name in ("bos_token_id", "eos_token_id"):
            if (token := getattr(self.tokenizer, name, None)) is not None:
                check_ids([token], self.config, self.path)
                return int(token)
        raise UserError(f"{self.path} names neither a first nor an end-of-text token: a text without context needs one")

    def decode(self, ids: Sequence[int]) -> str:
        with tokenizer_errors(f"the tokenizer of {self.path} failed on tokens"):
            return str(self.tokenizer.decode(list(ids)))

    def fingerprint(self) -> str:
        """A hash of the model's content, and of the sizes and times of its files and its tokenizer's files."""
        files = [*weight_files(self.path), *(self.path / name for name in TOKENIZER_FILES)]
        states = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.exists()]
        return digest([hash_of_model(self.path), states])


def digest(value: Any) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def open_directory(source: str | Path, label: str | None = None) -> Directory:
    """Config and tokenizer of a local directory or a hub repository; UserError if one is missing or broken."""
    path = resolve(source)
    config = check_config(path)
    check_tokenizer(path)
    return Directory(label or path.resolve().name, path, config, tokenizer_of(path, config))


def same_tokenizer(directories: Sequence[Directory]) -> None:
    """UserError if two directories tokenize text differently: their numbers could not be compared."""
    first = directories[0]
    for other in directories[1:]:
        if first.encode(PROBE) != other.encode(PROBE) or _vocabulary(first) != _vocabulary(other):
            raise UserError(
                f"{other.path} and {first.path} have different tokenizers, so they cannot be compared: "
                "evaluate them one at a time"
            )


def _vocabulary(directory: Directory) -> dict[str, int]:
    return dict(directory.tokenizer.get_vocab())


@dataclass(frozen=True)
class Question:
    """A prompt, how many tokens may follow, and when the text of these is enough."""

    tokens: Sequence[int]
    budget: int
    enough: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class Subject:
    """A loaded model with its directory.

    chunk: tokens per forward pass. batch_size: sequences measured together at most. None: sized to the machine.
    """

    directory: Directory
    model: Any
    chunk: int | None = None
    batch_size: int | None = None

    @property
    def label(self) -> str:
        return self.directory.label

    @functools.cached_property
    def passes(self) -> Passes:
        """The model's forward passes, sized to the machine."""
        gpu, cuda = on_gpu(), on_cuda()
        free = free_memory()
        chunk = self.chunk or (CUDA_CHUNK if cuda else GPU_CHUNK if gpu else CHUNK)
        rows = CUDA_ROWS if cuda else GPU_ROWS if gpu else ROWS
        return Passes(
            self.model,
            self.directory.path,
            chunk,
            rows=self.batch_size or rows,
            batch=GPU_BATCH if gpu else BATCH,
            cache_bytes=int((CUDA_CACHE_SHARE if cuda else CACHE_SHARE) * free),
            group=(CUDA_GROUP if cuda else GROUP) * chunk,
            heads=self.directory.heads,
            scores_bytes=max(SCORES_BYTES, int(SCORES_SHARE * free)) if gpu else SCORES_BYTES,
            few_shapes=cuda,
        )

    # -----------------------------------------------------------------------------------------------
    # The three uses of the model

    def logits(
        self, tokens: Sequence[int] | np.ndarray, tick: Tick | None = None, skip: int = 0
    ) -> Iterator[tuple[int, mx.array]]:
        """(start, logits (1, C, V)) of each chunk of `tokens` (T,), in order, without the first `skip` positions.

        The model reads its first token before them, if it has one.
        """
        cache = self.passes.new_cache()
        self.passes.prefill(cache, self.directory.before(tokens))
        self.passes.prefill(cache, tokens[:skip], tick)
        ids = mx.array(np.asarray(tokens, np.int32))[None]
        size = self._logits_chunk(ids)
        for start in range(skip, ids.shape[1], size):
            logits = self.model(ids[:, start : start + size], cache=cache)
            mx.eval(logits, [c.state for c in cache])
            self.passes.check_finite(are_finite(logits).item())
            yield start, logits
            mx.clear_cache()
            if tick:
                tick(min(size, ids.shape[1] - start))

    def nll(self, tokens: Sequence[int] | np.ndarray, tick: Tick | None = None, last: int | None = None) -> np.ndarray:
        """Negative log-likelihood of tokens[1:], each given all before it (see `logits`), in nats; (T + 1,) -> (T,).

        last: score only this many tokens at the end; the result has this length.
        """
        tokens = np.asarray(tokens, np.int32)
        parts = []
        skip = 0 if last is None else max(0, len(tokens) - 1 - last)
        for start, logits in self.logits(tokens[:-1], tick, skip):
            targets = mx.array(tokens[start + 1 : start + 1 + logits.shape[1]])[None]
            parts.append(np.array(token_nll(logits, itself, targets, workspace_bytes=4 * LOGITS_BYTES))[0])
        return np.concatenate(parts)

    def scores(self, items: Sequence[Continuations], wanted: Sequence[bool] | None = None) -> Iterator[list[Score]]:
        """(log-likelihood in nats, whether all are the model's first choice) of each wanted item's continuations."""
        return score(self.passes, items, wanted or [True] * len(items))

    def continuations(self, sequences: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[Score]:
        """The scores of one item: of the last `lengths[i]` tokens of each of its sequences."""
        return next(self.scores([_One(sequences, lengths)]))

    def answers(self, questions: Iterable[Question], tick: Tick | None = None) -> Iterator[list[int]]:
        """The greedy answer to each prompt, in order; prompts of similar lengths are read as one batch.

        An answer stops at an end token, which is not part of it, or once it is enough.
        """
        ends = set(getattr(self.directory.tokenizer, "eos_token_ids", None) or ())
        return generate(self.passes, map(self._prompt, questions), ends, tick)

    def greedy(
        self,
        prompt: Sequence[int],
        budget: int,
        tick: Tick | None = None,
        enough: Callable[[str], bool] | None = None,
    ) -> list[int]:
        """The greedy answer to one prompt; see `answers`."""
        return next(self.answers([Question(prompt, budget, enough)], tick))

    def _prompt(self, question: Question) -> Prompt:
        enough, decode = question.enough, self.directory.decode
        tokens = [int(token) for token in question.tokens]
        return Prompt(tokens, question.budget, enough and (lambda answer: enough(decode(answer))))

    # -----------------------------------------------------------------------------------------------

    def _logits_chunk(self, ids: mx.array) -> int:
        vocabulary = self.model(ids[:, :1]).shape[-1]  # read from the graph, nothing is computed
        return max(1, min(self.passes.chunk, LOGITS_BYTES // (FLOAT32 * vocabulary)))


def load_subject(
    directory: Directory, *, dtype: str = "auto", chunk: int | None = None, batch_size: int | None = None
) -> Subject:
    """Load the weights. dtype `auto` is the file's on a GPU and float32 on a CPU, where half precision is slow.

    Raises UserError if the weights do not fit the config.
    """
    config = check_model_dir(directory.path).config
    if dtype == "auto":
        dtype = "" if on_gpu() else "float32"
    model = load_frozen(directory.path, config, dtype or None)
    model.eval()
    return Subject(directory, model, chunk, batch_size)


@dataclass(frozen=True)
class _One:
    """One item of `Subject.scores`."""

    sequences: Sequence[Sequence[int]]
    lengths: Sequence[int]
