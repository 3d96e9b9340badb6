"""`verify --served URL DIR`: does a server apply the RoPE scaling of the model that it serves?

Many servers ignore a scaling in silence. A prompt beyond the old window is sent, and what the server generates is
compared with two computations here, by stock mlx-lm on the weights in DIR: with the scaling, and without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..data import python_prose, tokenizer_errors
from ..errors import UserError
from ..files import RunDir, reading
from ..models.directory import check_config, check_model_dir, path_for_mlx_lm
from ..models.tokenizer import tokenizer_of
from ..rope import inverse_frequencies, native_window, normalise
from .endpoint import Answer, Endpoint, NoCompletions, TooLong

NEW = 24  # tokens that the server generates
PROMPTS = 3  # prompts of different text, as long as the ones before decide nothing
LETTERS = 8  # characters that a token has at most, as a rule
CHUNK = 512  # tokens that are computed at once
TOLD_APART = 0.2  # nats: computations with and without the scaling must differ by more, or nothing can be told
CLOSE = 0.25  # the largest distance from the scaled model, as a part of that from scaled to unscaled
DECIDING = 3  # tokens at which the scaled and the unscaled model must prefer different ones, without logprobs
MOST = 2 / 3  # the part of these tokens that must be the scaled model's


@dataclass(frozen=True)
class Served:
    """Whether a server applies the scaling, and the reason in words. tokens: of the prompt."""

    live: bool
    tokens: int
    window: int
    reason: str

    def lines(self) -> list[str]:
        """The result as lines of text."""
        found = "live" if self.live else "NOT live"
        return [f"prompt of {self.tokens} tokens, old window {self.window}", self.reason, f"the scaling is {found}"]


@dataclass(frozen=True)
class _Evidence:
    """What one prompt shows.

    scaled, unscaled: how far the server is from each computation; apart: how far these are from each other. In nats
    a token with log-probabilities, else `votes` for each among the tokens that tell them apart.
    """

    scaled: float
    unscaled: float
    apart: float
    votes: tuple[int, int] | None = None

    @property
    def decides(self) -> bool:
        return self.apart >= TOLD_APART if self.votes is None else self.apart >= DECIDING

    @property
    def live(self) -> bool:
        if self.votes is None:
            return self.scaled < CLOSE * self.apart
        return self.votes[0] >= MOST * self.apart

    @property
    def words(self) -> str:
        if self.votes is not None:
            text = (
                f"of {self.apart:.0f} greedy tokens that tell them apart, {self.votes[0]} are the scaled model's and "
                f"{self.votes[1]} those of the model without the scaling"
            )
        else:
            text = (
                f"the server's log-probabilities differ by {self.scaled:.3g} nats a token from the scaled model's and "
                f"by {self.unscaled:.3g} from those without the scaling"
            )
        if self.live:
            return text
        without = self.votes[1] >= MOST * self.apart if self.votes else self.unscaled < CLOSE * self.apart
        return text + (": it computes as if there were no scaling" if without else ": it may also be another model")


def verify_served(
    url: str,
    source: str | Path,
    *,
    tokens: int | None = None,
    native: str | Path | None = None,
    model: str | None = None,
    timeout: float = 600.0,
    progress: Callable[[str], None] | None = None,
) -> Served:
    """Compare the server at `url` with the model in `source`, a model directory or a run.

    Args:
        tokens: of the prompt; by default twice the old window, or as much as the new one holds.
        native: the base model, whose config says how RoPE was before; needed only if `source` does not say.
        model: the name to ask the server for.
        timeout: seconds for one answer.
    Raises:
        UserError: the server cannot be reached or compared, or nothing can be told from its answers.
    """
    say = progress or (lambda _: None)
    endpoint = Endpoint(url, model, timeout)
    directory = _model_of(source)
    config = check_model_dir(directory).config
    before = _unscaled(config, directory, native)
    window, longest = native_window(before), native_window(config)
    count = tokens or min(2 * window, longest - NEW - 64)
    if not window < count <= longest - NEW:
        raise UserError(
            f"--tokens {count}: the prompt must be longer than the old window of {window} and, with the answer of "
            f"{NEW} tokens, fit the new one of {longest}"
        )
    tokenizer = tokenizer_of(directory, config)
    models = _Models(directory, config, before)
    for number in range(PROMPTS):
        text, ids = _prompt(tokenizer, count, number)
        say(f"asking {endpoint.url} to continue {len(ids)} tokens")
        try:
            answer, ids = _ask(endpoint, text, ids, tokenizer)
        except TooLong as error:
            return Served(False, len(ids), window, f"the server refuses a prompt of this length: {error}")
        if answer.read is not None and answer.read < len(ids) - 64:
            reason = f"the server read only {answer.read} tokens of the prompt: raise its context length"
            return Served(False, len(ids), window, reason)
        say("computing the same here, with and without the scaling")
        evidence = _weigh(models, ids, answer, tokenizer)
        if evidence is not None and evidence.decides:
            return Served(evidence.live, len(ids), window, evidence.words)
    raise UserError(
        f"nothing can be told: at {count} tokens the model computes much the same with and without its scaling, or the "
        "server answers too little; try more --tokens"
    )


def _model_of(source: str | Path) -> Path:
    """The model directory that is meant: of a run, its fused model."""
    path = Path(source)
    with reading(path):
        if not path.is_dir():
            raise UserError(f"{source} is not a model directory: give the directory of the model that is served")
        inner = RunDir(path).model
        return inner if inner.is_dir() and RunDir(path).config.is_file() else path


def _unscaled(config: Mapping[str, Any], directory: Path, native: str | Path | None) -> dict[str, Any]:
    """The config as it was before the scaling; UserError if it cannot be known."""
    if native is not None:
        base = check_config(Path(native))
        keys = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "max_position_embeddings")
        before = normalise({**config, **{key: base.get(key) for key in keys}})
        if all(np.array_equal(a, b) for a, b in _frequencies(config, before)):
            raise UserError(f"{directory} has the RoPE of {native}: there is no scaling to look for")
        return before
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type")
    if kind not in ("linear", "yarn", "llama3"):
        raise UserError(
            f"{directory} has no scaling of RoPE that a server could ignore; if it is in rope_theta (ntk), name the "
            "base model with --native"
        )
    window = scaling.get("original_max_position_embeddings") or round(native_window(config) / scaling["factor"])
    return normalise({**config, "rope_scaling": None, "rope_parameters": None, "max_position_embeddings": window})


def _frequencies(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    one, other = inverse_frequencies(a), inverse_frequencies(b)
    return ((one[kind], other[kind]) for kind in one.keys() & other.keys())


def _prompt(tokenizer: Any, count: int, number: int) -> tuple[str, list[int]]:
    """A text of about `count` tokens and its ids. Each `number` has another text."""
    prose = "\n".join(python_prose())
    part = len(prose) // (PROMPTS + 1)
    prose = prose[number * part :] + prose[: number * part]
    with tokenizer_errors("the model's tokenizer"):
        ids = list(tokenizer.encode(prose[: LETTERS * count]))
        if len(ids) < count and len(prose) > LETTERS * count:
            ids = list(tokenizer.encode(prose))
        ids *= -(-count // max(len(ids), 1))
        text = tokenizer.decode(ids[:count], skip_special_tokens=True)
        return text, list(tokenizer.encode(text))


def _ask(endpoint: Endpoint, text: str, ids: list[int], tokenizer: Any) -> tuple[Answer, list[int]]:
    """The server's answer, and the ids that it must have read: those of a chat if it has no plain completions."""
    try:
        answer = endpoint.complete(text, NEW)
    except NoCompletions:
        endpoint.chat = True
        try:
            return endpoint.complete(text, NEW), _chat_ids(tokenizer, text)
        except NoCompletions:  # pragma: no cover
            raise AssertionError from None
    if endpoint.chat:
        return answer, _chat_ids(tokenizer, text)
    bos = getattr(tokenizer, "bos_token_id", None)
    if answer.read == len(ids) + 1 and isinstance(bos, int):
        ids = [bos, *ids]
    elif answer.read == len(ids) - 1 and ids[0] == bos:
        ids = ids[1:]
    return answer, ids


def _chat_ids(tokenizer: Any, text: str) -> list[int]:
    with tokenizer_errors("the model's chat template"):
        return list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
        )


# -- what the answer means --


class _Models:
    """The model with and without its scaling, over the same weights; loaded at the first use."""

    def __init__(self, directory: Path, config: dict[str, Any], before: dict[str, Any]) -> None:
        self.directory, self.config, self.before = directory, config, before
        self.loaded: tuple[Any, Any] | None = None

    def logprobs(self, ids: list[int], new: list[int]) -> Iterator[np.ndarray]:
        """Log-probabilities (len(new), V) of what follows `ids` and each of `new` but the last: scaled, then not."""
        from ..models.pair import share

        if self.loaded is None:
            from mlx_lm.utils import load_model

            with path_for_mlx_lm(self.directory) as path:
                model, _ = load_model(path, model_config=dict(self.config))
            self.loaded = model, share(model, self.before)
        return (_following(model, ids, new) for model in self.loaded)


def _following(model: Any, ids: list[int], new: list[int]) -> np.ndarray:
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    for first in range(0, len(ids) - 1, CHUNK):
        model(mx.array([ids[:-1][first : first + CHUNK]]), cache=cache)
        mx.eval([layer.state for layer in cache])
    logits = model(mx.array([[ids[-1], *new[:-1]]]), cache=cache)[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def _weigh(models: _Models, ids: list[int], answer: Answer, tokenizer: Any) -> _Evidence | None:
    """What an answer shows; None if it has no token."""
    new = _new_tokens(answer, ids, tokenizer)
    if not new:
        return None
    scaled, unscaled = models.logprobs(ids, new)
    rows = np.arange(len(new))
    if answer.logprobs is not None and len(answer.logprobs) == len(new):
        given = np.array(answer.logprobs)
        ours, theirs = scaled[rows, new], unscaled[rows, new]
        apart = float(np.abs(ours - theirs).mean())
        return _Evidence(float(np.abs(given - ours).mean()), float(np.abs(given - theirs).mean()), apart)
    ours, theirs = scaled.argmax(-1), unscaled.argmax(-1)
    deciding = ours != theirs
    votes = int((deciding & (ours == new)).sum()), int((deciding & (theirs == new)).sum())
    return _Evidence(0.0, 0.0, float(deciding.sum()), votes)


def _new_tokens(answer: Answer, ids: list[int], tokenizer: Any) -> list[int]:
    """The ids of the generated tokens: the server's own, else by encoding its text."""
    if answer.tokens is not None:
        size = len(tokenizer)
        return list(answer.tokens) if all(0 <= index < size for index in answer.tokens) else []
    with tokenizer_errors("the model's tokenizer"):
        return list(tokenizer.encode(answer.text, add_special_tokens=False))
