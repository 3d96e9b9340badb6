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
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from ..data import Document, check_ids, encode, first_token, tokenize, tokenizer_errors
from ..errors import UserError
from ..files import TOKENIZER_FILES
from ..machine import on_gpu
from ..models.directory import check_config, check_model_dir, resolve
from ..models.pair import load_frozen
from ..models.shape import Shape
from ..models.tokenizer import check_tokenizer, tokenizer_of
from ..models.weights import hash_of_model, weight_files
from ..ops.logits import token_nll
from ..rope import native_window

CHUNK = 512  # positions per forward pass
LOGITS_BYTES = 128 << 20  # of one chunk's float32 logits at most: a large vocabulary makes chunks shorter
FLOAT32 = 4
PROBE = "It was 3:45 on a naïve Sunday;\n\n  the “window” held 1234 tokens."  # shows that two tokenizers differ

Tick = Callable[[int], None]  # called with the number of tokens done since the last call


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
        return first_token(self.tokenizer, self.config)

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, after the first token if there is one."""
        return [*self.before(ids := self.encode_plain(text)), *ids]

    def encode_plain(self, text: str) -> list[int]:
        """The tokens of `text` alone; UserError if the model has no embedding of one."""
        ids = encode(self.tokenizer, text)
        check_ids(ids, self.config, self.path)
        return ids

    def before(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        """The tokens to put before a text of tokens `ids`: the first token, unless they begin with it."""
        return [] if self.first is None or (len(ids) and ids[0] == self.first) else [self.first]

    def stream(self, documents: Iterable[Document], limit: int) -> np.ndarray:
        """The first `limit` tokens of documents, without the first token; UserError if there is no embedding of one."""
        tokens = tokenize(documents, self.tokenizer, limit=limit)
        check_ids(tokens, self.config, self.path)
        return tokens

    def prefix_token(self) -> int:
        """The token before a text without context: the first token, or else the end-of-text token."""
        for name in ("bos_token_id", "eos_token_id"):
            if (token := getattr(self.tokenizer, name, None)) is not None:
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
class Subject:
    """A loaded model with its directory. All methods take one sequence, batch size 1."""

    directory: Directory
    model: Any
    chunk: int = CHUNK

    @property
    def label(self) -> str:
        return self.directory.label

    # -----------------------------------------------------------------------------------------------
    # The three uses of the model

    def logits(self, tokens: Sequence[int] | np.ndarray, tick: Tick | None = None) -> Iterator[tuple[int, mx.array]]:
        """(start, logits (1, C, V)) of each chunk of `tokens` (T,), in order.

        The model reads its first token before them, if it has one.
        """
        cache = make_prompt_cache(self.model)
        self.prefill(cache, self.directory.before(tokens))
        ids = mx.array(np.asarray(tokens, np.int32))[None]
        size = self._logits_chunk(ids)
        for start in range(0, ids.shape[1], size):
            logits = self.model(ids[:, start : start + size], cache=cache)
            mx.eval(logits, [c.state for c in cache])
            self._check_finite(logits)
            yield start, logits
            mx.clear_cache()
            if tick:
                tick(min(size, ids.shape[1] - start))

    def nll(self, tokens: Sequence[int] | np.ndarray, tick: Tick | None = None) -> np.ndarray:
        """Negative log-likelihood of tokens[1:], each given all before it (see `logits`), in nats; (T + 1,) -> (T,)."""
        tokens = np.asarray(tokens, np.int32)
        parts = []
        for start, logits in self.logits(tokens[:-1], tick):
            targets = mx.array(tokens[start + 1 : start + 1 + logits.shape[1]])[None]
            parts.append(np.array(token_nll(logits, itself, targets, workspace_bytes=4 * LOGITS_BYTES))[0])
        return np.concatenate(parts)

    def continuations(self, sequences: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether all are the model's first choice) of the last `lengths[i]` tokens of each.

        The common beginning of all sequences is computed once.
        """
        shared = min(_common_prefix(sequences), min(len(s) - n for s, n in zip(sequences, lengths, strict=True)) - 1)
        cache = make_prompt_cache(self.model)
        self.prefill(cache, sequences[0][:shared])
        if not can_trim_prompt_cache(cache):
            shared = 0
        results = []
        for sequence, length in zip(sequences, lengths, strict=True):
            if shared == 0:
                cache = make_prompt_cache(self.model)
            body = sequence[shared : len(sequence) - length - 1]
            self.prefill(cache, body)
            results.append(self._score(cache, sequence[len(sequence) - length - 1 :]))
            if shared:
                trim_prompt_cache(cache, len(body) + length)
        return results

    def greedy(
        self,
        prompt: Sequence[int],
        budget: int,
        tick: Tick | None = None,
        enough: Callable[[str], bool] | None = None,
    ) -> list[int]:
        """At most `budget` tokens after `prompt`, each the model's first choice.

        Generation stops at an end token, which is not returned, or once `enough` is true of the text so far.
        """
        cache = make_prompt_cache(self.model)
        self.prefill(cache, prompt[:-1], tick)
        ends = set(getattr(self.directory.tokenizer, "eos_token_ids", None) or ())
        tokens: list[int] = []
        last = int(prompt[-1])
        while len(tokens) < budget:
            logits = self.model(mx.array([[last]]), cache=cache)
            self._check_finite(logits[:, -1:])
            last = int(mx.argmax(logits[0, -1]).item())  # type: ignore[arg-type]
            if last in ends:
                break
            tokens.append(last)
            if enough and enough(self.directory.decode(tokens)):
                break
        return tokens

    def prefill(self, cache: list[Any], tokens: Sequence[int], tick: Tick | None = None) -> None:
        """Put `tokens` into the cache. Their logits are not computed."""
        ids = mx.array(np.asarray(tokens, np.int32))[None]
        for start in range(0, len(tokens), self.chunk):
            part = ids[:, start : start + self.chunk]
            self.model(part, cache=cache)
            mx.eval([c.state for c in cache])
            mx.clear_cache()
            if tick:
                tick(part.shape[1])

    # -----------------------------------------------------------------------------------------------

    def _check_finite(self, logits: mx.array) -> None:
        """UserError if logits are not finite: a score would not show it."""
        if not mx.isfinite(logits.max(axis=-1).sum()).item():
            raise UserError(
                f"{self.directory.path} computes logits that are not finite: its weights are damaged, or need a "
                "wider type, such as --dtype float32"
            )

    def _logits_chunk(self, ids: mx.array) -> int:
        vocabulary = self.model(ids[:, :1]).shape[-1]  # read from the graph, nothing is computed
        return max(1, min(self.chunk, LOGITS_BYTES // (FLOAT32 * vocabulary)))

    def _score(self, cache: list[Any], tokens: Sequence[int]) -> tuple[float, bool]:
        ids = mx.array(np.asarray(tokens, np.int32))[None]
        logits = self.model(ids[:, :-1], cache=cache)
        self._check_finite(logits)
        nll = token_nll(logits, itself, ids[:, 1:]).sum()
        greedy = (mx.argmax(logits, axis=-1) == ids[:, 1:]).all()
        mx.eval(nll, greedy, [c.state for c in cache])
        return -float(nll.item()), bool(greedy.item())  # type: ignore[arg-type]


def load_subject(directory: Directory, *, dtype: str = "auto", chunk: int = CHUNK) -> Subject:
    """Load the weights. dtype `auto` is the file's on a GPU and float32 on a CPU, where half precision is slow.

    Raises UserError if the weights do not fit the config.
    """
    config = check_model_dir(directory.path).config
    if dtype == "auto":
        dtype = "" if on_gpu() else "float32"
    model = load_frozen(directory.path, config, dtype or None)
    model.eval()
    return Subject(directory, model, chunk)


def itself(logits: mx.array) -> mx.array:
    """The head of a model whose hidden states are logits already."""
    return logits


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    shortest = min(len(s) for s in sequences)
    for i in range(shortest):
        if any(s[i] != sequences[0][i] for s in sequences):
            return i
    return shortest
