"""What a model writes after a prompt of held-out text, token by token, each the most likely one."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..data import first_token, tokenizer_errors
from ..models.pair import Pair
from ..results.sample import Sample

PROMPT, ANSWER = 64, 72  # tokens at most


def write(pair: Pair, model: Any, window: np.ndarray) -> Sample:
    """What `model`, the teacher or the student of `pair`, writes after the first tokens of a held-out window (T,).

    At most half of the window is the prompt, and prompt and answer stay inside the native window. Logits that are
    not finite end the answer.
    """
    prompt = [int(token) for token in window[: max(1, min(PROMPT, len(window) // 2, pair.native_window // 2))]]
    first = first_token(pair.tokenizer, pair.native_config)
    tokens = [*([] if first is None else [first]), *prompt]
    training, ends = bool(model.training), set(getattr(pair.tokenizer, "eos_token_ids", None) or ())
    model.eval()
    try:
        answer = _greedy(model, tokens, min(ANSWER, pair.native_window - len(tokens)), ends)
    finally:
        model.train(training)
    with tokenizer_errors(f"the tokenizer of {pair.path} failed on tokens"):
        return Sample(*(str(pair.tokenizer.decode(ids)) for ids in (prompt, answer)))


def _greedy(model: Any, tokens: list[int], budget: int, ends: set[int]) -> list[int]:
    cache, ids = make_prompt_cache(model), tokens
    answer: list[int] = []
    while len(answer) < budget:
        logits = model(mx.array([ids]), cache=cache)[0, -1]
        best: Any = mx.argmax(logits).item()
        token = int(best)
        if token in ends or not mx.isfinite(logits[token]).item():
            break
        answer.append(token)
        ids = [token]
    return answer
