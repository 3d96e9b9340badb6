"""Texts, and sentencepiece models that sentencepiece itself trains on them."""

import io

import sentencepiece

CORPUS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune,",
    "must be in want of a wife. However little known the feelings or views of such a man may be",
    "on his first entering a neighbourhood, this truth is so well fixed in the minds of the",
    "surrounding families, that he is considered as the rightful property of some one or other",
    "of their daughters. In 1813 and 1984 and 2048 naïve cafés sold 27 apples for 3.50 each.",
] * 4
TEXTS = [
    "a truth universally acknowledged",
    " leading and  double   spaces ",
    "1813 12345 3.50\n\ttab\n\n",
    "naïve café Ünïcode 日本語 🤗",
    "don't I'll we've",
    "",
]


def train(kind, **over):
    stream = io.BytesIO()
    options = {
        "vocab_size": 420 if kind == "bpe" else 330,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        **over,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=stream, model_type=kind, minloglevel=2, **options
    )
    return stream.getvalue()
