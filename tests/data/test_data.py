"""Text of every form becomes the same tokens; the order of blocks depends on the seed alone."""

from __future__ import annotations

import concurrent.futures
import gzip
import json
import lzma
import os
import random
from pathlib import Path

import numpy as np
import pytest
from tiny import PROSE
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from mlx_linearard.data import (
    Blocks,
    check_ids,
    encode,
    first_token,
    forms,
    pieces,
    python_prose,
    read_documents,
    read_pieces,
    split,
    tokenize,
    windows,
)
from mlx_linearard.errors import UserError

DOCUMENTS = ["One fine day.\n", "Zwölf Boxkämpfer.\n"]


class Bytes:
    """UTF-8 bytes as tokens."""

    eos_token_id: int | None = 256

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return list(text.encode())


def test_every_form_reads_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, text in enumerate(DOCUMENTS):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    lines = "\n".join(json.dumps({"text": text, "title": "x"}) for text in DOCUMENTS) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    for name in ("folder", "a.jsonl", "a.jsonl.gz", "a.jsonl.xz"):
        assert list(read_documents(str(tmp_path / name))) == DOCUMENTS, name
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(DOCUMENTS[1].encode()))
    assert list(read_documents(str(tmp_path / "b.txt.xz"))) == DOCUMENTS[1:]


@pytest.mark.parametrize(
    ("name", "body", "says"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n ", "is empty"),
        ("binary.txt", b"\x00\x01\x02text", "binary"),
        ("latin.txt", "Zw\xf6lf".encode("latin-1"), "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is not valid JSON"),
        ("b.jsonl", b'{"content": "x"}', "line 1 has no `text`"),
        ("c.jsonl", b'["text"]', "line 1 has no `text`"),
        ("d.jsonl", b"", "is empty"),
        ("e.txt.gz", b"not gzip", "cannot be read"),
        ("f.txt.xz", b"not xz", "is damaged"),
        ("g.txt.gz", gzip.compress(b"x" * 5000, mtime=0)[:-20], "is damaged"),
        ("h.pdf", b"%PDF", "not a supported form of text"),
        ("i.txt.gz", gzip.compress(b"x" * 5000, mtime=0)[:30] + b"\xff" * 9, "cannot be read|is damaged"),
        ("j.txt.xz", lzma.compress(b"some text" * 500)[:-30] + b"\0" * 30, "is damaged"),
        ("k.jsonl", b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "line 1 is not valid JSON"),
        ("l.jsonl", b'{"text": "x"}\n' + b"[" * 100_000, "line 2 is not valid JSON"),
        ("m.jsonl", b'{"text": NaN}', "line 1 is not valid JSON"),
        ("n.jsonl", b'{"text": ["x"]}', "line 1 has no `text`"),
        ("o.txt", "text".encode("utf-16"), "not UTF-8"),
        ("p.txt", b"fine \xed\xa0\xbd", "not UTF-8"),  # a surrogate in UTF-8
    ],
)
def test_bad_text_is_refused_by_name(tmp_path: Path, name: str, body: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(UserError, match=says) as error:
        list(read_documents(str(tmp_path / name)))
    assert name in str(error.value)


def test_missing_text_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        list(read_documents(str(tmp_path / "nowhere.txt")))
    with pytest.raises(UserError, match=r"holds no \.txt"):
        list(read_documents(str(tmp_path)))


def test_names_that_are_no_text_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    (tmp_path / "file.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe.txt")
    for name, says in (
        ("folder.jsonl", r"holds no \.txt"),
        ("dangling.txt", "does not exist"),
        ("file.txt/inside.txt", "cannot be read"),
        ("pipe.txt", "is not a regular file"),
        ("x" * 300 + ".txt", "cannot be read"),
        ("null\0.txt", "is not a file name"),
    ):
        with pytest.raises(UserError, match=says):
            list(read_documents(str(tmp_path / name)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_without_permission_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    folder.chmod(0)
    try:
        for source in (folder, folder / "a.txt"):
            with pytest.raises(UserError, match="cannot be read: Permission denied"):
                list(read_documents(str(source)))
    finally:
        folder.chmod(0o755)


def test_marks_and_halves_of_characters_are_read_as_text(tmp_path: Path) -> None:
    """A byte order mark is not part of the text; half of a surrogate pair becomes U+FFFD."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfZw\xc3\xb6lf")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a \\ud83d b \\ude00 c \\ud83d\\ude00"}\n')
    assert list(read_documents(str(tmp_path / "a.txt"))) == ["Zwölf"]
    assert list(read_documents(str(tmp_path / "b.jsonl"))) == ["a \ufffd b \ufffd c \U0001f600"]
    assert encode(Bytes(), "a\ud83d") == list("a\ufffd".encode())


def test_a_hub_dataset_without_the_extra_names_it() -> None:
    with pytest.raises(UserError, match="hf:"):
        next(read_documents("hf:some/name"))


def test_each_document_has_an_end_token_and_the_limit_holds() -> None:
    assert tokenize(["ab", "c"], Bytes(), limit=100).tolist() == [97, 98, 256, 99, 256]
    assert tokenize(["ab", "c"], Bytes(), limit=4).tolist() == [97, 98, 256, 99]
    assert tokenize([], Bytes(), limit=4).size == 0


# ---------------------------------------------------------------------------------------------------
# Long texts: in pieces, with the tokens of the complete text

LLAMA3 = "|".join([
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
])  # fmt: skip
SPECIAL = ["<unk>", "<s>", "<|im_end|>"]


def sample_prose() -> str:
    return "".join(python_prose())[:60_000]


def byte_level(split: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    pattern = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*pattern, bytes_])
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator([sample_prose(), "a" * 500, " " * 500, "0123456789" * 50], trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """Merges over the complete text, after a space, as in Llama 2."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([sample_prose()], trainer)
    settings = json.loads(tokenizer.to_str())
    return Tokenizer.from_str(json.dumps({**settings, "pre_tokenizer": None}))


def unigram() -> Tokenizer:
    """Unigram that strips text and joins spaces, as T5 does."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(), spaces])
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([sample_prose()[:20_000]], trainer)
    return tokenizer


class Wrapped:
    """A tokenizer of the tokenizers library, which remembers the longest text that it was given."""

    eos_token_id: int | None = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.longest = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.longest = max(self.longest, len(text))
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def texts() -> dict[str, str]:
    rng = random.Random(0)
    words = sample_prose().split()[:4000]
    return {
        "prose": sample_prose(),
        "digits": "".join(rng.choices("0123456789", k=20_000)),
        "one letter": "a" * 10_003,
        "no spaces": "".join(rng.choices("天地玄黄宇宙洪荒日月盈昃", k=8_000)),
        "white space": "".join(word + " " * rng.choice([1, 1, 2, 40, 300]) for word in words[:1500]),
        "lines": "line one\r\nline two\n\n\n   x\t\t y\r\n" * 900,
        "combining": "e\u0301a\u0308 👩‍👩‍👧🇩🇪" * 2000,
        "special": "hi <|im_end|>\n<s>there " * 1500,
        "base64": "".join(rng.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/", k=20_000)),
    }


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "PIECE", 3000)
    monkeypatch.setattr(pieces, "PIECE", 3000)
    monkeypatch.setattr(pieces, "_OVERLAP", 400)


@pytest.mark.parametrize(
    "make", [lambda: byte_level(None), lambda: byte_level(LLAMA3), sentencepiece_like, unigram],
    ids=["gpt2", "llama3", "llama2", "unigram"],
)  # fmt: skip
def test_pieces_have_the_tokens_of_the_complete_text(small_pieces: None, make) -> None:
    tokenizer = Wrapped(make())
    for name, text in texts().items():
        whole = tokenizer.encode(text, add_special_tokens=False)
        tokenizer.longest = 0
        assert tokenize([text], tokenizer, limit=10**9).tolist() == whole, name
        assert tokenize([text], tokenizer, limit=700).tolist() == whole[:700], name
        if name in ("prose", "base64", "lines", "special"):
            assert tokenizer.longest <= 4000, name


def test_pieces_of_a_file_have_the_tokens_of_the_complete_file(small_pieces: None, tmp_path: Path) -> None:
    tokenizer = Wrapped(byte_level(None))
    tokenizer.eos_token_id = 1
    (tmp_path / "a.txt").write_text(sample_prose())
    (tmp_path / "b.txt").write_text("second")
    whole = [*tokenizer.encode(sample_prose(), add_special_tokens=False), 1]
    both = [*whole, *tokenizer.encode("second", add_special_tokens=False), 1]
    assert tokenize(read_pieces(str(tmp_path)), tokenizer, limit=10**9).tolist() == both
    assert tokenize(read_documents(str(tmp_path)), tokenizer, limit=10**9).tolist() == both


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_no_more_is_read_than_the_limit_needs(tmp_path: Path, suffix: str) -> None:
    """The file is damaged after its first megabytes: reading only its beginning does not fail."""
    text = (PROSE * 60_000).encode()
    packed = {"": lambda b: b, ".gz": gzip.compress, ".xz": lambda b: lzma.compress(b, preset=0)}[suffix](text)
    path = tmp_path / f"long.txt{suffix}"
    path.write_bytes(packed[: len(packed) // 2] + b"\xff" * 100)
    tokens = tokenize(read_pieces(str(path)), Bytes(), limit=20_000)
    assert tokens.tolist() == list(text[:20_000])
    with pytest.raises(UserError, match=path.name):
        tokenize(read_pieces(str(path)), Bytes(), limit=10**9)


def test_a_line_of_json_has_a_largest_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "MAX_LINE", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + json.dumps({"text": "x" * 2000}))
    with pytest.raises(UserError, match=r"a\.jsonl line 2 has more than 1000 characters"):
        list(read_documents(str(tmp_path / "a.jsonl")))


def test_a_text_without_any_cut_is_cut_in_the_end(small_pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Whole(Bytes):
        """Every token depends on the complete text."""

        longest = 0

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            self.longest = max(self.longest, len(text))
            return [len(text) * 256 + byte for byte in text.encode()]

    monkeypatch.setattr(pieces, "_LONGEST", 20_000)
    tokenizer = Whole()
    assert len(tokenize([PROSE * 900], tokenizer, limit=10**9)) == len(PROSE) * 900 + 1
    assert tokenizer.longest <= 48_000


# ---------------------------------------------------------------------------------------------------
# Tokenizers


class WithFirst(Bytes):
    """UTF-8 bytes, with a first token before them when special tokens are asked for."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [300, *text.encode()] if add_special_tokens else list(text.encode())


class Plain(Bytes):
    bos_token_id = 301

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [*text.encode(), 256] if add_special_tokens else list(text.encode())


def test_the_tokenizer_decides_on_the_first_token() -> None:
    assert first_token(WithFirst()) == 300
    assert first_token(Plain(), {"model_type": "llama"}) is None  # an end token is none
    assert first_token(Plain(), {"model_type": "gemma3_text"}) == 301


def test_each_block_begins_with_the_first_token() -> None:
    tokens = np.arange(101, dtype=np.int32)
    blocks = Blocks(tokens, 10, seed=3, first=300)
    rows = np.concatenate([blocks.batch(i, 2) for i in range(5)])
    assert rows.shape == (10, 11) and rows.dtype == np.int32 and (rows[:, 0] == 300).all()
    assert sorted(rows[:, 1]) == list(range(0, 100, 10))
    assert all((row[1:] == np.arange(row[1], row[1] + 10)).all() for row in rows)
    assert Blocks(tokens[:10], 10, seed=0, first=300).count == 1


class Panic(BaseException):
    """Like pyo3's PanicException: no Exception."""


@pytest.mark.parametrize(
    "error", [Panic("called `Option::unwrap()`\non a `None` value"), Exception("bad"), IndexError()]
)
def test_a_failing_tokenizer_is_one_line(error: BaseException) -> None:
    class Failing(Bytes):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            raise error

    for use in (lambda: tokenize(["a"], Failing(), limit=9), lambda: first_token(Failing())):
        with pytest.raises(UserError, match="the tokenizer failed on text") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_what_a_tokenizer_prints_is_dropped_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    """Two threads tokenize at once; afterwards standard error is as before."""

    class Loud(Bytes):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            os.write(2, b"thread panicked at src/lib.rs")
            return list(text.encode())

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: [encode(Loud(), "text") for _ in range(50)], range(4)))
    os.write(2, b"own line")
    assert capfd.readouterr().err == "own line"


def test_a_token_without_an_embedding_is_refused() -> None:
    check_ids([257, 3], {"vocab_size": 258}, "m")
    check_ids([], {"vocab_size": 258}, "m")
    check_ids([5000], {}, "m")
    with pytest.raises(UserError, match="the tokenizer of m makes token 258, but the model has only 258 embeddings"):
        check_ids(np.array([3, 258]), {"vocab_size": 258}, "m")


# ---------------------------------------------------------------------------------------------------
# Blocks and windows


def test_blocks_overlap_by_their_target_and_cover_an_epoch_once() -> None:
    tokens = np.arange(101, dtype=np.int32)
    blocks = Blocks(tokens, 10, seed=3)
    epoch = np.concatenate([blocks.batch(i, 2) for i in range(5)])
    assert sorted(epoch[:, 0]) == list(range(0, 100, 10))
    assert all((row == np.arange(row[0], row[0] + 11)).all() for row in epoch)
    assert not (epoch == np.concatenate([blocks.batch(i, 2) for i in range(5, 10)])).all()  # another order


def test_a_batch_depends_on_its_number_alone() -> None:
    tokens = np.arange(1001, dtype=np.int32)
    one, other = Blocks(tokens, 10, seed=3), Blocks(tokens, 10, seed=3)
    for i in range(7):
        one.batch(i, 3)
    assert (one.batch(40, 3) == other.batch(40, 3)).all()
    assert not (one.batch(0, 3) == Blocks(tokens, 10, seed=4).batch(0, 3)).all()


def test_too_little_text_is_refused() -> None:
    with pytest.raises(UserError, match="too few for one block of 11"):
        Blocks(np.arange(10, dtype=np.int32), 10, seed=0)


def test_windows_spread_and_held_out_text_is_not_trained_on() -> None:
    tokens = np.arange(1000, dtype=np.int32)
    cut = windows(tokens, 100, 3)
    assert cut.shape == (3, 101) and cut[:, 0].tolist() == [0, 300, 600]
    assert windows(tokens, 1000, 3).shape == (0, 1001)
    train, held = split(tokens, 150)
    assert len(held) == 150 and train[-1] + 1 == held[0]
    assert len(split(tokens, 900)[1]) == 200


def test_this_python_has_prose() -> None:
    text = "".join(python_prose())
    assert len(text) > 300_000 and "The following" in text


def test_documents_are_joined_from_their_pieces(tmp_path: Path) -> None:
    """A text of several pieces is one document; a folder has one document per file, in order of name."""
    long = "A sentence of some words. " * 10_000
    (tmp_path / "a.txt").write_text(long)
    (tmp_path / "b.txt").write_text("short")
    assert list(read_documents(str(tmp_path))) == [long, "short"]
