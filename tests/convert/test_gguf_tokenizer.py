"""Tokenizers of GGUF files against independent ones: byte-level BPE written out here, and sentencepiece itself."""

import functools
import itertools
import unicodedata

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_linearard.convert.gguf_tokenizer import from_metadata
from sentencepieces import CORPUS, TEXTS, train
from tokenizers import Tokenizer


def byte_symbols():
    """The printable characters that stand for bytes in byte-level BPE."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def words(text):
    """GPT-2's split with every digit alone, by character classes rather than by a regular expression."""
    contractions = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")

    def kind(character):
        if character.isspace():
            return "space"
        return {"L": "letter", "N": "number"}.get(unicodedata.category(character)[0], "other")

    found, start = [], 0
    for piece in _digits_apart(text):
        start = 0
        while start < len(piece):
            rest = piece[start:]
            match = next((c for c in contractions if rest.startswith(c)), None)
            if match is None:
                body = 1 if rest[0] == " " and len(rest) > 1 and kind(rest[1]) != "space" else 0
                what = kind(rest[body])
                end = body
                while end < len(rest) and kind(rest[end]) == what:
                    end += 1
                if what == "space" and end < len(rest) and end > 1:
                    end -= 1  # the last space belongs to the next word
                match = rest[:end]
            found.append(match)
            start += len(match)
    return found


def _digits_apart(text):
    pieces = [""]
    for character in text:
        if character.isnumeric():
            pieces += [character, ""]
        else:
            pieces[-1] += character
    return [piece for piece in pieces if piece]


def independent_bpe(text, vocab, merges):
    """The ids of byte-level BPE: in each word, the pair of lowest rank is merged until none is left."""
    ranks = {tuple(merge.split(" ", 1)): rank for rank, merge in enumerate(merges)}
    symbols = byte_symbols()
    ids = []
    for word in words(text):
        parts = [symbols[byte] for byte in word.encode()]
        while len(parts) > 1:
            pairs = [(ranks.get(pair, 1 << 60), i) for i, pair in enumerate(itertools.pairwise(parts))]
            rank, at = min(pairs)
            if rank == 1 << 60:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [vocab[part] for part in parts]
    return ids


@functools.cache
def byte_level():
    """Tokens and merges, learnt from the corpus by a plain count of pairs, and the tokenizer made from them."""
    symbols = byte_symbols()
    corpus = [[symbols[byte] for byte in word.encode()] for line in CORPUS for word in words(line)]
    tokens, merges = ["<|end|>", *sorted(symbols.values())], []
    for _ in range(150):
        counts: dict[tuple[str, str], int] = {}
        for parts in corpus:
            for pair in itertools.pairwise(parts):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(sorted(counts), key=counts.get)
        merges.append(" ".join(best))
        tokens.append("".join(best))
        for parts in corpus:
            at = 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == best:
                    parts[at : at + 2] = ["".join(best)]
                at += 1
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
    }
    return tokens, merges, from_metadata(metadata, "test").tokenizer


@pytest.mark.parametrize("text", [*TEXTS, *CORPUS[:5]])
def test_byte_level_bpe_splits_as_the_definition(text):
    tokens, merges, made = byte_level()
    vocab = {token: index for index, token in enumerate(tokens)}
    assert made.encode(text).ids == independent_bpe(text, vocab, merges)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=30))
@settings(max_examples=200, deadline=None)
def test_byte_level_bpe_gives_every_text_back(text):
    made = byte_level()[2]
    assert made.decode(made.encode(text).ids) == text


def test_a_gguf_sentencepiece_vocabulary():
    data = train("bpe")
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    count = reference.vocab_size()
    kinds = [6 if reference.is_byte(i) else 3 if reference.is_control(i) else 1 for i in range(count)]
    kinds[reference.unk_id()] = 2
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [reference.id_to_piece(i) for i in range(count)],
        "tokenizer.ggml.scores": np.array([reference.get_score(i) for i in range(count)], np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
    }
    made: Tokenizer = from_metadata(metadata, "test").tokenizer
    for text in (*TEXTS, *CORPUS[:5]):
        assert made.encode(text).ids == [1, *reference.encode(text)]


@pytest.mark.parametrize(
    ("pre", "begins"), [("llama-bpe", True), ("llama3", True), ("smollm", False), ("gpt-2", False)]
)
def test_the_pre_tokenizer_says_whether_texts_begin_with_bos(pre, begins):
    """As in llama.cpp, if the file itself does not say."""
    tokens, merges, _ = byte_level()
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
    }
    assert (from_metadata(metadata, "test").tokenizer.encode("a").ids[0] == 0) == begins
    for said in (True, False):
        made = from_metadata({**metadata, "tokenizer.ggml.add_bos_token": said}, "test")
        assert (made.tokenizer.encode("a").ids[0] == 0) == said
        assert made.config["add_bos_token"] == said


def test_a_sentencepiece_vocabulary_has_the_usual_special_tokens():
    """llama.cpp's defaults: 0 is unknown, 1 begins and 2 ends a text."""
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "▁"]}
    made = from_metadata(metadata, "test")
    assert made.token_ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    assert (made.config["bos_token"], made.config["unk_token"]) == ("<s>", "<unk>")
    assert made.tokenizer.encode("a").ids[0] == 1
