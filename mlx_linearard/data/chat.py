"""Conversations -> tokens, with the tokenizer's own chat template, as mlx-lm does."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from .rows import Conversation
from .tokens import Tokenizer, checked, tokenizer_errors


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template: mlx-lm's wrapper says it, transformers' tokenizers hold it."""
    return bool(getattr(tokenizer, "has_chat_template", getattr(tokenizer, "chat_template", None)))


def chat_tokens(
    conversation: Conversation, tokenizer: Tokenizer, *, mask_prompt: bool = False
) -> tuple[list[int], int]:
    """The ids of a conversation, and how many of them are the prompt; 0 without `mask_prompt`.

    With `mask_prompt` all is prompt but the last message, as in mlx-lm. transformers renders the template in a
    sandbox. Raises UserError if there is no template, or if it fails on the conversation.
    """
    if not has_template(tokenizer):
        raise UserError(
            f"{conversation.place} is a conversation, and the model's tokenizer has no chat template: give rows with "
            "`text`, or a model that has one"
        )
    messages = conversation.messages
    with tokenizer_errors(f"the chat template failed on {conversation.place}"):
        ids = _render(tokenizer, conversation, messages)
        if not mask_prompt:
            return ids, 0
        answered = messages[-1].get("role") == "assistant"
        return ids, len(_render(tokenizer, conversation, messages[:-1], add_generation_prompt=answered))


def _render(tokenizer: Any, conversation: Conversation, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    ids = tokenizer.apply_chat_template(messages, tools=conversation.tools, return_dict=False, **options)
    return checked(list(ids))
