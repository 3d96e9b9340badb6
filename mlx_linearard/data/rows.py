"""Documents: prose, and the rows of data sets in the three forms that mlx-lm reads.

A row is an object with `text`, with `messages` (and perhaps `tools`), or with `prompt` and `completion`. As in
mlx-lm, the first row decides the form of all rows of a source; other fields are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import UserError

# The kinds of documents.
PROSE, TEXT, CONVERSATIONS, COMPLETIONS = "prose", "text rows", "conversations", "prompts with completions"
FIELDS = ("text", "messages", "tools", "prompt", "completion")  # what a row is made of
ROW_FORMS = "`text`, `messages` (and `tools`), or `prompt` and `completion`"


@dataclass(frozen=True)
class TextRow:
    """A row with `text`. place: where it stands, for messages."""

    text: str
    place: str = "the row"


@dataclass(frozen=True)
class Conversation:
    """A row with `messages`, or with a prompt and its completion as messages of the user and the assistant.

    place: where it stands, for messages.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    place: str = "the conversation"
    kind: str = CONVERSATIONS


Document = str | Iterable[str] | TextRow | Conversation  # a text, its consecutive pieces, or a row


def kind_of(document: Document) -> str:
    """The kind of a document."""
    if isinstance(document, Conversation):
        return document.kind
    return TEXT if isinstance(document, TextRow) else PROSE


def texts_of(document: Document) -> Iterable[str]:
    """A document as the pieces of a plain text; of a conversation, what its messages say."""
    if isinstance(document, Conversation):
        contents = (message.get("content") for message in document.messages)
        return ["\n\n".join(content for content in contents if isinstance(content, str))]
    if isinstance(document, TextRow):
        return [document.text]
    return [document] if isinstance(document, str) else document


def text_of(document: Document) -> str:
    """A document as one plain text; see `texts_of`."""
    return "".join(texts_of(document))


def documents_from(rows: Iterable[tuple[str, Any]], source: object) -> Iterator[TextRow | Conversation]:
    """The document of each (place, row); UserError if a row has another form or if there is no text at all."""
    make: Callable[[dict[str, Any], str], TextRow | Conversation] | None = None
    empty = True
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{place} has no `text` or other field: a row is an object with {ROW_FORMS}")
        make = make or _form_of(row, place)
        document = make(row, place)
        empty = empty and not text_of(document).strip()
        yield document
    if empty:
        raise UserError(f"{source} is empty: give rows with text")


def _form_of(row: dict[str, Any], place: str) -> Callable[[dict[str, Any], str], TextRow | Conversation]:
    """The function that makes documents of rows like this one; mlx-lm tries the fields in the same order."""
    if "prompt" in row and "completion" in row:
        return _completion
    if "messages" in row:
        return _conversation
    if "text" in row:
        return _text_row
    fields = ", ".join(sorted(map(str, row)))[:200] or "no field"
    raise UserError(f"{place} has no `text`, but {fields}: a row has {ROW_FORMS}")


def _text_row(row: dict[str, Any], place: str) -> TextRow:
    if not isinstance(text := row.get("text"), str):
        raise UserError(f"{place} has no `text` field that holds text")
    return TextRow(text, place)


def _completion(row: dict[str, Any], place: str) -> Conversation:
    for name in ("prompt", "completion"):
        if not isinstance(row.get(name), str):
            raise UserError(f"{place} has no `{name}` field that holds text")
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    return Conversation(messages, _tools(row, place), place, COMPLETIONS)


def _conversation(row: dict[str, Any], place: str) -> Conversation:
    messages = row.get("messages")
    if not (isinstance(messages, list) and messages):
        raise UserError(f"{place} has no `messages` field that holds a list of messages")
    for number, message in enumerate(messages, start=1):
        if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
            raise UserError(f"{place}: message {number} must be an object with `role` and `content`")
    return Conversation(messages, _tools(row, place), place)


def _tools(row: dict[str, Any], place: str) -> list[Any] | None:
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{place}: `tools` must be a list of tools, not a {type(tools).__name__}")
    return tools
