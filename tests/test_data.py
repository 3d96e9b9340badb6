"""Text of every form becomes the same tokens; blocks come in an order that depends on nothing but the seed."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from mlx_linearard.data import Blocks, python_prose, read_documents, split, tokenize, windows
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
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
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
        ("f.txt.xz", b"not xz", "cannot be read"),
        ("g.txt.gz", gzip.compress(b"x" * 5000)[:-20], "cannot be read"),
        ("h.pdf", b"%PDF", "not a form of text"),
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


def test_a_hub_dataset_without_the_extra_names_it() -> None:
    with pytest.raises(UserError, match="hf:"):
        next(read_documents("hf:some/name"))


def test_documents_are_ended_and_the_limit_holds() -> None:
    assert tokenize(["ab", "c"], Bytes(), limit=100).tolist() == [97, 98, 256, 99, 256]
    assert tokenize(["ab", "c"], Bytes(), limit=4).tolist() == [97, 98, 256, 99]
    assert tokenize([], Bytes(), limit=4).size == 0


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


def test_this_python_carries_prose() -> None:
    text = "".join(python_prose())
    assert len(text) > 300_000 and "The following" in text
