"""Tokenizers rebuilt from sentencepiece models, against sentencepiece itself and transformers."""

import functools
import json
import random

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepieces import CORPUS, TEXTS, train
from transformers import AutoTokenizer

from mlx_linearard.errors import UserError
from mlx_linearard.models import tokenizer


@pytest.mark.parametrize(
    ("kind", "over"),
    [
        ("bpe", {}),
        ("bpe", {"add_dummy_prefix": False}),
        ("bpe", {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}),
        ("unigram", {}),
    ],
)
def test_sentencepiece_models_split_as_sentencepiece_does(tmp_path, kind, over):
    data = train(kind, **over)
    (tmp_path / "tokenizer.model").write_bytes(data)
    parts = tokenizer.from_sentencepiece(tmp_path / "tokenizer.model")
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    random.seed(0)
    letters = "aetruhsn ofw127.ßé日"
    texts = [*TEXTS, *CORPUS[:5], *("".join(random.choices(letters, k=25)) for _ in range(100))]
    for text in texts:
        ids = parts.tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text), text
        assert parts.tokenizer.decode(ids, skip_special_tokens=False) == reference.decode(ids)
    assert parts.tokenizer.encode("a").ids[0] == reference.bos_id()


def test_a_bare_tokenizer_model_loads_in_transformers(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train("bpe"))
    (tmp_path / "added_tokens.json").write_text('{"<|extra|>": 420}')
    settings_ = {"add_bos_token": True, "pad_token": {"content": "<|extra|>"}, "chat_template": "{{ 1 }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_))
    tokenizer.write(tmp_path, tokenizer.from_sentencepiece(tmp_path / "tokenizer.model"))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode("<|extra|>") == [1, 420]
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<s>", "</s>", "<|extra|>")
    text = "In 1813 a naïve 日本"
    assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == text
    (tmp_path / "added_tokens.json").write_text('{"<|extra|>": 999}')
    with pytest.raises(UserError, match="do not follow the 420"):
        tokenizer.from_sentencepiece(tmp_path / "tokenizer.model")


@given(st.binary(max_size=60), st.integers(0, 4000))
@settings(max_examples=60, deadline=None)
def test_damaged_models_raise_nothing_but_our_error(tmp_path_factory, noise, place):
    root = tmp_path_factory.getbasetemp() / "spm"
    root.mkdir(exist_ok=True)
    whole = _model()
    at = place % len(whole)
    (root / "tokenizer.model").write_bytes(whole[:at] + noise + whole[at + len(noise) :])
    try:
        tokenizer.from_sentencepiece(root / "tokenizer.model")
    except UserError as error:
        assert "tokenizer.model" in str(error)


@functools.cache
def _model():
    return train("bpe")
