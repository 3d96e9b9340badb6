"""A server with OpenAI's HTTP interface: sends one greedy completion, and reads tokens and log-probabilities.

Servers differ: some have no /completions, some take `logprobs` as a number, some give none. Each form is tried.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError, one_line

KEY = "OPENAI_API_KEY"  # the environment variable of OpenAI's own client
MAX_ANSWER = 1 << 26  # bytes
_TOO_LONG = re.compile(r"context|too (long|large|many)|max\w*[ _-]?(model|seq|token|input|len)|exceed", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """What a server generated. read: how many tokens the prompt had there; None if it does not say.

    tokens, logprobs: of each generated token, as far as the server gives them; `tokens` are ids.
    """

    text: str
    read: int | None = None
    tokens: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None


class TooLong(Exception):
    """The server refuses the prompt because of its length; the message is the server's."""


class _Refused(Exception):
    """An HTTP status from 400 to 499."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Endpoint:
    """A server at `url`. model: the name to ask for; None: the only one that the server has.

    The key in OPENAI_API_KEY is sent to this server only, and is in no message.
    """

    url: str
    model: str | None = None
    timeout: float = 600.0
    chat: bool = False
    _logprobs: list[Any] = field(default_factory=lambda: [True, 1, None])  # the forms that were not refused yet

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        try:
            usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
        except ValueError:
            usable = False
        if not usable or not self.url.isprintable() or " " in self.url:
            raise UserError(f"--served {self.url!r} is not an address such as http://127.0.0.1:8080/v1")
        self.url = self.url.rstrip("/")
        if not parts.path.strip("/"):
            self.url += "/v1"

    def complete(self, prompt: str, tokens: int) -> Answer:
        """The greedy continuation of `prompt`, at most `tokens` tokens.

        Raises:
            TooLong: the server refuses the prompt because of its length.
            UserError: the server cannot be reached, refuses, or answers something else.
        """
        while True:
            logprobs = self._logprobs[0]
            try:
                return _answer(self._ask(prompt, tokens, logprobs), self.url)
            except _Refused as error:
                if error.status in (401, 403):
                    raise UserError(
                        f"{self.url} refuses access (HTTP {error.status}): put its key into {KEY}"
                    ) from None
                if error.status in (404, 405, 501) and not self.chat:
                    raise NoCompletions from None
                if _TOO_LONG.search(str(error)) and "logprobs" not in str(error):
                    raise TooLong(str(error)) from None
                if self.model is None and error.status in (400, 404, 422) and "model" in str(error).lower():
                    self.model = self._only_model()
                elif len(self._logprobs) > 1:
                    self._logprobs.pop(0)
                else:
                    raise UserError(f"{self.url} refuses the request (HTTP {error.status}): {error}") from None

    def _ask(self, prompt: str, tokens: int, logprobs: Any) -> Any:
        body: dict[str, Any] = {"max_tokens": tokens, "temperature": 0, "stream": False}
        if logprobs is not None:
            body["logprobs"] = bool(logprobs) if self.chat else logprobs
        if self.model is not None:
            body["model"] = self.model
        if self.chat:
            body["messages"] = [{"role": "user", "content": prompt}]
            return self._send("/chat/completions", body)
        return self._send("/completions", {**body, "prompt": prompt})

    def _only_model(self) -> str:
        try:
            listed = self._send("/models", None)
        except _Refused:
            listed = None
        entries = listed.get("data") if isinstance(listed, dict) else None
        names = [str(entry["id"]) for entry in entries or [] if isinstance(entry, dict) and "id" in entry]
        if len(names) != 1:
            shown = one_line(", ".join(names))[:200] or "none"
            raise UserError(f"{self.url} has several models or none ({shown}): name one with --served-model")
        return names[0]

    def _send(self, path: str, body: Any) -> Any:
        """The JSON of an answer; _Refused for a status of 4xx."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with _OPENER.open(request, timeout=self.timeout) as response:
                content = response.read(MAX_ANSWER)
            return json.loads(content)
        except urllib.error.HTTPError as error:
            message = _message(error.read(1 << 16)) or str(error.reason)
            if 400 <= error.code < 500:
                raise _Refused(error.code, message) from None
            raise UserError(f"{self.url + path} answers HTTP {error.code}: {message}") from None
        except TimeoutError:
            raise UserError(f"{self.url} does not answer within {self.timeout:g} s: raise --timeout") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise UserError(f"{self.url} does not answer within {self.timeout:g} s: raise --timeout") from None
            raise UserError(
                f"{self.url} cannot be reached ({one_line(error.reason)}): is the server running?"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{self.url} broke the connection ({one_line(error) or type(error).__name__})") from None
        except (ValueError, RecursionError):
            raise UserError(f"{self.url + path} does not answer in JSON: is it an OpenAI-compatible server?") from None


class NoCompletions(Exception):
    """The server has no /completions."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would send the key to another server."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def _message(content: bytes) -> str:
    """The server's message of an error, on one short line."""
    text = content.decode("utf-8", "replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    while isinstance(value, Mapping):
        value = next((value[key] for key in ("error", "message", "detail") if value.get(key)), "")
    return one_line(str(value))[:300]


def _answer(value: Any, url: str) -> Answer:
    """The first choice of an answer; UserError if it has none."""
    try:
        choice = value["choices"][0]
        message = choice.get("message")
        text = choice["text"] if message is None else message.get("content") or ""
        if not isinstance(text, str):
            raise TypeError
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UserError(f"{url} answers without a completion: is it an OpenAI-compatible server?") from None
    usage = value.get("usage")
    read = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    tokens, logprobs = _logprobs(choice.get("logprobs"))
    made = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
    if logprobs and isinstance(made, int) and made != len(logprobs):  # llama.cpp leaves out parts of a character
        tokens = logprobs = None
    return Answer(text, read if isinstance(read, int) and read > 0 else None, tokens, logprobs)


def _logprobs(given: Any) -> tuple[tuple[int, ...] | None, tuple[float, ...] | None]:
    """Ids and log-probabilities of the generated tokens, from the forms of both interfaces."""
    if not isinstance(given, Mapping):
        return None, None
    content = given.get("content")
    if isinstance(content, list) and all(isinstance(entry, Mapping) for entry in content):
        ids, values = [entry.get("id") for entry in content], [entry.get("logprob") for entry in content]
    else:
        ids, values = [], given.get("token_logprobs") or []
    numbers = values and all(isinstance(value, int | float) and value == value for value in values)
    known = ids and all(isinstance(index, int) and not isinstance(index, bool) for index in ids)
    return tuple(ids) if known else None, tuple(map(float, values)) if numbers else None
