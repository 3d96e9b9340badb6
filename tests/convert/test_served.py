"""`verify --served`: a real mlx_lm.server with and without the scaling, and scripted servers of other kinds."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_linearard.convert.__main__ import NOT_LIVE
from mlx_linearard.convert.__main__ import run as convert
from mlx_linearard.convert.hf import scale
from mlx_linearard.convert.served import NEW, verify_served
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from servers import Reply, mlx_lm_server, scripted
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers

from mlx_linearard.data import python_prose
from mlx_linearard.errors import UserError
from mlx_linearard.machine import on_gpu
from mlx_linearard.models.tokenizer import tokenizer_of

KEY = "sk-not-to-be-shown"


def with_characters(base: Path) -> Path:
    """A tokenizer for which every id is a character, so that any text that is generated encodes to the same ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(base / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    template = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    return base


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of a window of 128, the same with YaRN and NTK, and another model. Every id is a character."""
    folder = tmp_path_factory.mktemp("served")
    base = with_characters(tiny_model(folder / "base"))
    yarn = scale(base, folder / "yarn", method="yarn", factor=4.0)
    ntk = scale(base, folder / "ntk", method="ntk", factor=4.0)
    other = tiny_model(folder / "other", seed=1)
    return {"base": base, "yarn": yarn, "ntk": ntk, "other": other}


def test_a_real_server_with_and_without_the_scaling(
    served: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """One mlx_lm.server serves the scaled model, and on request the base model."""
    with mlx_lm_server(served["yarn"]) as url:
        assert convert(["verify", "--served", url, str(served["yarn"])]) == 0
        assert "the scaling is live" in capsys.readouterr().out
        asked = ["verify", "--served", url.removesuffix("/v1"), str(served["yarn"]), "--served-model"]
        assert convert([*asked, str(served["base"])]) == NOT_LIVE == 1
        out = capsys.readouterr().out
        assert "as if there were no scaling" in out and "the scaling is NOT live" in out
        assert convert(["verify", "--served", url, str(served["yarn"]), "--tokens", "200"]) == 0


class Fake:
    """Computes greedily with a real model, and answers in the form of some server."""

    def __init__(self, model: Path, form: str) -> None:
        self.model, self.form, self.keys = load_model(model)[0], form, set[str | None]()
        mx.eval(self.model(mx.array([[1]])))  # mlx computes lazily, and the thread of a request could not
        self.tokenizer = tokenizer_of(model, json.loads((model / "config.json").read_text()))

    def __call__(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        self.keys.add(headers.get("Authorization"))
        if path == "/v1/models":
            return 200, {"data": [{"id": "the-model"}]}
        chat = path.endswith("/chat/completions")
        if self.form == "chat" and not chat:
            return 404, b"Not Found"
        if self.form == "named" and body.get("model") != "the-model":
            return 400, {"error": {"message": "model is required"}}
        if self.form == "legacy" and body.get("logprobs") is True:
            return 422, {"detail": "logprobs must be an integer"}
        if self.form == "text" and "logprobs" in body:
            return 400, {"error": "logprobs: not supported"}
        text = body["messages"][0]["content"] if chat else body["prompt"]
        ids = self.tokenizer.encode(("<s>" if chat or self.form == "bos" else "") + text)
        new, values = self.greedy(ids, body["max_tokens"])
        texts = [self.tokenizer.decode([index]) for index in new]
        content = [{"token": text, "logprob": value} for text, value in zip(texts, values, strict=True)]
        if self.form == "bos":
            content = [{**entry, "id": index} for entry, index in zip(content, new, strict=True)]
        found: Any = None if self.form in ("text", "named") else {"content": content}
        if self.form == "legacy":
            found = {"tokens": texts, "token_logprobs": values}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(new)}
        if self.form == "parts":  # llama.cpp leaves out parts of a character
            found["content"].pop(3)
        said = {"message": {"content": "".join(texts)}} if chat else {"text": "".join(texts)}
        return 200, {"choices": [{**said, "logprobs": found}], "usage": usage}

    def greedy(self, ids: list[int], count: int) -> tuple[list[int], list[float]]:
        new: list[int] = []
        values: list[float] = []
        cache = make_prompt_cache(self.model)
        while len(new) < count:
            logits = self.model(mx.array([new[-1:] or ids]), cache=cache)[0, -1].astype(mx.float32)
            new.append(int(logits[:256].argmax()))  # only ids that are characters
            values.append(float(logits[new[-1]] - mx.logsumexp(logits)))
        return new, values


@pytest.mark.parametrize("form", ["legacy", "text", "chat", "named", "bos", "parts"])
@pytest.mark.parametrize("model", ["yarn", "base"])
def test_servers_of_other_kinds(served: dict[str, Path], form: str, model: str) -> None:
    with scripted(Fake(served[model], form)) as url:
        result = verify_served(url, served["yarn"])
    assert result.live == (model == "yarn"), result.lines()
    assert ("greedy tokens" in result.reason) == (form in ("text", "named", "parts"))


@pytest.mark.parametrize("form", ["legacy", "text"])
def test_another_model_is_not_live(served: dict[str, Path], form: str) -> None:
    fake = Fake(served["other"], form)
    fake.tokenizer = Fake(served["base"], form).tokenizer
    with scripted(fake) as url:
        result = verify_served(url, served["yarn"])
    assert not result.live and "another model" in result.reason


def test_ntk_needs_the_base_model(served: dict[str, Path]) -> None:
    for model, live in (("ntk", True), ("base", False)):
        with scripted(Fake(served[model], "legacy")) as url:
            with pytest.raises(UserError, match="--native"):
                verify_served(url, served["ntk"])
            assert verify_served(url, served["ntk"], native=served["base"]).live == live
    with pytest.raises(UserError, match="no scaling to look for"):
        verify_served("http://127.0.0.1:1", served["base"], native=served["base"])


def test_the_key_goes_to_the_server_and_nowhere_else(
    served: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    fake = Fake(served["yarn"], "legacy")
    with scripted(fake) as url:
        assert convert(["verify", "--served", url, str(served["yarn"])]) == 0
    assert fake.keys == {f"Bearer {KEY}"} and KEY not in "".join(capsys.readouterr())
    with scripted(lambda *_: (401, {"error": "no"})) as url, pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
        verify_served(url, served["yarn"])
    assert KEY not in str(caught.value)
    with scripted(lambda *_: (302, b"")) as url, pytest.raises(UserError, match="HTTP 302"):
        verify_served(url, served["yarn"])  # a redirect would take the key along


def reply(value: Any, status: int = 200) -> Callable[..., Reply]:
    return lambda *_: (status, value)


TOO_LONG = {"error": {"message": "This model's maximum context length is 128 tokens", "code": 400}}


def test_a_shorter_window_is_not_live(served: dict[str, Path]) -> None:
    with scripted(reply(TOO_LONG, 400)) as url:
        result = verify_served(url, served["yarn"])
    assert not result.live and "maximum context length is 128" in result.reason
    short = {"choices": [{"text": "a"}], "usage": {"prompt_tokens": 128}}
    with scripted(reply(short)) as url:
        result = verify_served(url, served["yarn"])
    assert not result.live and "read only 128 tokens" in result.reason


WRONG = [
    (reply(b"<html>"), "does not answer in JSON"),
    (reply({}), "without a completion"),
    (reply({"choices": [{"text": 5}]}), "without a completion"),
    (reply({"choices": [None]}), "without a completion"),
    (reply({"error": "broken\nserver"}, 500), "HTTP 500: broken server"),
    (reply({"detail": [{"loc": 1}]}, 422), "HTTP 422"),
    (reply({"choices": [{"text": ""}]}), "nothing can be told"),
    (reply({"choices": [{"text": "", "logprobs": {"content": [{"id": 10**9, "logprob": 0}]}}]}), "nothing can be told"),
    (reply({"error": "model not found"}, 404), r"several models or none|without a completion|HTTP 404"),
]  # fmt: skip


@pytest.mark.parametrize(("answers", "message"), WRONG)
def test_wrong_answers_end_in_one_line(served: dict[str, Path], answers: Any, message: str) -> None:
    with scripted(answers) as url, pytest.raises(UserError, match=message) as caught:
        verify_served(url, served["yarn"], tokens=200)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8080", "ftp://a", "http://", "http://a:x", "file:///etc/passwd", "http://a b"]
)
def test_wrong_addresses(served: dict[str, Path], url: str) -> None:
    with pytest.raises(UserError, match="is not an address"):
        verify_served(url, served["yarn"])


def test_servers_that_are_not_there(served: dict[str, Path]) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match="cannot be reached"):
            verify_served(url, served["yarn"], timeout=0.5)
        silent.listen()
        with pytest.raises(UserError, match=r"does not answer within 0\.5 s: raise --timeout"):
            verify_served(url, served["yarn"], timeout=0.5)


def test_wrong_use(served: dict[str, Path], tmp_path: Path) -> None:
    here = "http://127.0.0.1:1"
    for arguments, message in (
        (["--served", here, str(tmp_path / "none")], "is not a model directory"),
        (["--served", here, str(served["base"])], "no scaling of RoPE"),
        (["--served", here, str(served["yarn"]), str(served["base"])], "leave out the second model"),
        (["--served", here, str(served["yarn"]), "--tokens", "100"], "longer than the old window of 128"),
        (["--served", here, str(served["yarn"]), "--tokens", "500"], "fit the new one of 512"),
        ([str(served["yarn"])], "name a second one"),
    ):
        with pytest.raises(UserError, match=message):
            convert(["verify", *arguments])


def smollm2(folder: Path) -> Path:
    """SmolLM2 in float32, whose arithmetic a CPU is fast in."""
    from mlx_linearard.convert.default_model import default_model
    from mlx_linearard.convert.hf import from_hf

    return from_hf(default_model(), folder / "smollm2", dtype="float32")


def large_window(folder: Path) -> Path:
    """A tiny model of the same window."""
    return with_characters(
        tiny_model(folder / "tiny", max_position_embeddings=8192, num_hidden_layers=2, eos_token_id=None)
    )


ON_A_GPU = pytest.mark.skipif(not on_gpu(), reason="prompts of 12000 tokens take an hour on two CPU cores")


@pytest.mark.slow
@pytest.mark.parametrize("make", [large_window, pytest.param(smollm2, marks=ON_A_GPU)])
def test_the_openai_client_beyond_8192_tokens(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """It streams mlx_lm.generate's greedy tokens for a short and a long prompt; the scaling is live, and then not."""
    openai = pytest.importorskip("openai")
    from mlx_lm import generate, load

    base = make(tmp_path)
    yarn = scale(base, tmp_path / "yarn", method="yarn", factor=4.0)
    model, tokenizer = load(str(yarn))
    prose = "".join(python_prose())[:80000]
    with mlx_lm_server(yarn) as url:
        client = openai.OpenAI(base_url=url, api_key="none", timeout=3600)
        for size in (40, 8300):
            prompt = tokenizer.decode(tokenizer.encode(prose)[:size])
            assert abs(len(tokenizer.encode(prompt)) - size) < 20
            stream = client.completions.create(
                model="default_model", prompt=prompt, max_tokens=NEW, temperature=0, stream=True
            )
            text = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
            assert text == generate(model, tokenizer, prompt, max_tokens=NEW) and len(text) >= NEW
        result = verify_served(url, yarn, tokens=12000, timeout=3600)
        assert result.live, result.lines()
        result = verify_served(url, yarn, tokens=12000, model=str(base), timeout=3600)
        assert not result.live, result.lines()
