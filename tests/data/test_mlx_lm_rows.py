"""Rows of data sets: the tokens that mlx-lm's own classes make of them, in every form of file, and each mistake."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mlx_linearard.convert.default_model import default_model
from mlx_lm.tuner.datasets import create_dataset
from tiny import PROSE, tiny_tokenizer

from mlx_linearard.data import (
    COMPLETIONS,
    CONVERSATIONS,
    EVALUATED,
    TEXT,
    Blocks,
    Stream,
    has_split,
    read_documents,
    read_pieces,
    read_stream,
)
from mlx_linearard.data import (
    PROSE as PROSE_KIND,
)
from mlx_linearard.errors import UserError
from mlx_linearard.files import read_config
from mlx_linearard.models.tokenizer import tokenizer_of

TEMPLATE = (
    "{{ bos_token }}{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m.tool_calls is defined and m.tool_calls %}"
    "{{ m.tool_calls | tojson }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
ASKED = [{"role": "user", "content": "How late is it, bitte schön?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "Noon."}]
ROWS: dict[str, list[dict[str, Any]]] = {
    TEXT: [{"text": "One fine day.\n", "title": 3}, {"text": "It ended.</s>"}, {"text": PROSE * 30}],
    CONVERSATIONS: [
        {"messages": ANSWERED},
        {"messages": [{"role": "system", "content": "Be brief."}, *ANSWERED, *ASKED], "tools": [TOOL]},
        {"messages": [*ASKED, {"role": "assistant", "content": "", "tool_calls": [{"name": "time"}]}]},
        {"messages": [*ANSWERED, *ASKED, {"role": "assistant", "content": PROSE * 20}]},
    ],
    COMPLETIONS: [
        {"prompt": "One", "completion": "two.", "text": "not read"},
        {"prompt": "Three", "completion": "four", "tools": [TOOL]},
    ],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny tokenizer, which begins a text with <s>, with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    tiny_tokenizer(folder)
    settings = json.loads((folder / "tokenizer.json").read_text())
    bos = {"id": "<s>", "ids": [256], "tokens": ["<s>"]}
    settings["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": bos},
    }
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "config.json").write_text("{}")
    return tokenizer_of(folder, {"eos_token_id": 257})


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def of_mlx_lm(rows: list[dict[str, Any]], tokenizer: Any, mask_prompt: bool) -> list[tuple[list[int], int]]:
    """(tokens, tokens of the prompt) of each row, as mlx-lm trains on it."""
    dataset = create_dataset(rows, tokenizer, SimpleNamespace(mask_prompt=mask_prompt))
    return [dataset.process(row) for row in rows]


def check_against_mlx_lm(path: Path, rows: list[dict[str, Any]], tokenizer: Any, *, mask_prompt: bool) -> Stream:
    theirs = of_mlx_lm(rows, tokenizer, mask_prompt)
    ours = read_stream(read_pieces(str(path)), tokenizer, limit=10**9, mask_prompt=mask_prompt)
    assert ours.tokens.tolist() == [token for ids, _ in theirs for token in ids]
    assert ours.starts.tolist() == [sum(len(ids) for ids, _ in theirs[:n]) for n in range(len(rows))]
    if mask_prompt:
        assert ours.answers is not None
        assert ours.answers.tolist() == [i >= prompt for ids, prompt in theirs for i in range(len(ids))]
    return ours


@pytest.mark.parametrize("mask_prompt", [False, True])
@pytest.mark.parametrize("kind", ROWS)
def test_rows_have_the_tokens_of_mlx_lm(tmp_path: Path, tokenizer: Any, kind: str, mask_prompt: bool) -> None:
    path = write_lines(tmp_path / "a.jsonl", ROWS[kind])
    if kind == TEXT and mask_prompt:
        with pytest.raises(UserError, match=r"a\.jsonl line 1 is text without prompts: --mask-prompt needs"):
            read_stream(read_pieces(str(path)), tokenizer, limit=9, mask_prompt=True)
        return
    stream = check_against_mlx_lm(path, ROWS[kind], tokenizer, mask_prompt=mask_prompt)
    assert stream.kinds == {kind: len(stream.tokens)}
    assert stream.tokens[0] == 256
    if mask_prompt:
        assert stream.answers is not None and 0 < stream.answers.sum() < len(stream.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("mask_prompt", [False, True])
@pytest.mark.parametrize("kind", [CONVERSATIONS, COMPLETIONS])
def test_smollm2_reads_conversations_as_mlx_lm_does(tmp_path: Path, kind: str, mask_prompt: bool) -> None:
    directory = default_model()
    smol = tokenizer_of(directory, read_config(directory))
    path = write_lines(tmp_path / "a.jsonl", ROWS[kind])
    check_against_mlx_lm(path, ROWS[kind], smol, mask_prompt=mask_prompt)
    check_against_mlx_lm(write_lines(tmp_path / "b.jsonl", ROWS[TEXT]), ROWS[TEXT], smol, mask_prompt=False)


# ---------------------------------------------------------------------------------------------------
# Forms of files


@pytest.mark.parametrize("kind", ROWS)
def test_every_form_of_rows_has_the_same_tokens(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    lines = write_lines(tmp_path / "a.jsonl", ROWS[kind])
    (tmp_path / "b.json").write_text(json.dumps(ROWS[kind], indent=2))
    (tmp_path / "c.json").write_bytes(lines.read_bytes())
    (tmp_path / "d.json.gz").write_bytes(gzip.compress((tmp_path / "b.json").read_bytes(), mtime=0))
    whole = read_stream(read_pieces(str(lines)), tokenizer, limit=10**9).tokens.tolist()
    for name in ("b.json", "c.json", "d.json.gz"):
        assert read_stream(read_pieces(str(tmp_path / name)), tokenizer, limit=10**9).tokens.tolist() == whole, name


@pytest.mark.parametrize("kind", [TEXT, COMPLETIONS])
def test_parquet_has_the_same_tokens(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs the extra `datasets`")
    parquet = importlib.import_module("pyarrow.parquet")
    rows = [{name: value for name, value in row.items() if name != "tools"} for row in ROWS[kind]] * 40
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    lines = write_lines(tmp_path / "a.jsonl", rows)
    one, other = (read_stream(read_pieces(str(p)), tokenizer, limit=10**9) for p in (lines, tmp_path / "a.parquet"))
    assert one.tokens.tolist() == other.tokens.tolist() and one.kinds == other.kinds
    parquet.write_table(arrow.table({"title": ["x"]}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])
    for name, says in (("b.parquet", "no column `text`, but title"), ("c.parquet", "damaged, or not a parquet file")):
        with pytest.raises(UserError, match=says):
            list(read_documents(str(tmp_path / name)))


def test_parquet_without_the_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"a\.parquet needs the extra `datasets`: pip install"):
        list(read_documents(str(tmp_path / "a.parquet")))


def test_markdown_is_prose(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# Title\n")
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    assert list(read_documents(str(tmp_path))) == ["# Title\n", "text"]
    assert list(read_documents(str(tmp_path / "a.md"))) == ["# Title\n"]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"content": "x"}], "line 1 has no `text`, but content: a row has `text`, `messages`"),
        ([{"text": "x"}, {"messages": ANSWERED}], "line 2 has no `text` field that holds text"),
        ([{"messages": []}], "line 1 has no `messages` field that holds a list"),
        ([{"messages": "hello"}], "line 1 has no `messages` field that holds a list"),
        ([{"messages": ["hello"]}], "message 1 must be an object with `role`"),
        ([{"messages": [*ASKED, {"content": "x"}]}], "message 2 must be an object with `role`"),
        ([{"messages": ANSWERED, "tools": "[]"}], "`tools` must be a list of tools, not a str"),
        ([{"prompt": "x", "completion": None}], "no `completion` field that holds text"),
        ([{"prompt": ASKED, "completion": "x"}], "no `prompt` field that holds text"),
        ([{"prompt": " ", "completion": ""}], "is empty"),
    ],
)
def test_wrong_rows_are_one_line(tmp_path: Path, rows: list[Any], says: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=says) as error:
        list(read_documents(str(path)))
    assert "a.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_wrong_json_files_are_one_line(tmp_path: Path) -> None:
    for name, body, says in (
        ("a.json", "[", "a.json is not valid JSON"),
        ("b.json", "[]", "b.json is empty"),
        ("c.json", '[{"text": "x"}, 3]', "c.json row 2 has no `text`"),
        ("d.json", "{\n}", "d.json line 1 is not valid JSON"),
        ("e.csv", "text", "give text as .txt or .md; or rows with .* as .jsonl, .json or .parquet"),
        ("f.parquet.gz", "x", "is not a supported form"),
    ):
        (tmp_path / name).write_text(body)
        with pytest.raises(UserError, match=says):
            list(read_documents(str(tmp_path / name)))


# ---------------------------------------------------------------------------------------------------
# Splits


def test_a_folder_of_splits_is_read_as_mlx_lm_does(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": name}])
    (tmp_path / "README.md").write_text("not read")
    assert list(read_documents(str(tmp_path))) == ["train"]
    assert [d.text for d in read_pieces(str(tmp_path), EVALUATED)] == ["test"]  # type: ignore[union-attr]
    assert has_split(str(tmp_path), "valid")
    (tmp_path / "test.jsonl").unlink()
    assert [d.text for d in read_pieces(str(tmp_path), EVALUATED)] == ["valid"]  # type: ignore[union-attr]
    (tmp_path / "valid.jsonl").unlink()
    assert not has_split(str(tmp_path), "valid")
    with pytest.raises(UserError, match=r"holds train\.jsonl, but no test\.jsonl or valid\.jsonl: add it, or name"):
        list(read_pieces(str(tmp_path), EVALUATED))


def test_a_folder_of_text_may_hold_a_valid_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    write_lines(tmp_path / "valid.jsonl", [{"text": "other"}])
    assert list(read_documents(str(tmp_path))) == ["text"] and not has_split(str(tmp_path), "valid")


def hub(monkeypatch: pytest.MonkeyPatch, sets: dict[tuple[str, str | None], dict[str, list[Any]]]) -> None:
    """A stand-in for the library `datasets`."""
    module = ModuleType("datasets")

    def names(name: str, config: str | None) -> list[str]:
        return list(sets[name, config])

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> list[Any]:
        assert streaming
        return sets[name, config][split]

    module.get_dataset_split_names, module.load_dataset = names, load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_hub_set_has_a_name_a_configuration_and_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = {"train": [{"messages": ANSWERED, "tools": None}], "validation": [{"messages": ASKED, "tools": None}]}
    hub(monkeypatch, {("a/b", None): {"train": [{"text": "t"}]}, ("a/b", "chat"): chat})
    assert list(read_documents("hf:a/b")) == ["t"]
    assert list(read_documents("hf:a/b@train")) == ["t"]
    assert list(read_documents("hf:a/b:chat@validation")) == [ASKED[0]["content"]]
    assert next(iter(read_pieces("hf:a/b:chat", EVALUATED))).messages == ASKED  # type: ignore[union-attr]
    assert has_split("hf:a/b:chat", "valid") and not has_split("hf:a/b", "valid")
    assert not has_split("hf:a/b:chat@train", "valid")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hf:", "does not name a data set of the hub: give hf:NAME"),
        ("hf:a/b@", "does not name a data set"),
        ("hf:a b", "does not name a data set"),
        ("hf:a/b@train[:10%]", "names a part of a split"),
        ("hf:a/b@dev", "hf:a/b@dev cannot be loaded"),
        ("hf:c/d", "hf:c/d cannot be loaded"),
        ("hf:e/f", "hf:e/f row 1 has no `text`, but question: a row has"),
    ],
)
def test_wrong_hub_names_are_one_line(monkeypatch: pytest.MonkeyPatch, source: str, says: str) -> None:
    hub(monkeypatch, {("a/b", None): {"train": [{"text": "t"}]}, ("e/f", None): {"train": [{"question": "x"}]}})
    with pytest.raises(UserError, match=says):
        list(read_documents(source))
    with pytest.raises(UserError, match=r"has no split test or valid, but train: give hf:NAME\[:CONFIG\]"):
        list(read_pieces("hf:a/b", EVALUATED))


def test_the_real_library_streams_the_same_rows(tmp_path: Path, tokenizer: Any) -> None:
    pytest.importorskip("datasets", reason="needs the extra `datasets`")
    for name in ("train", "validation"):
        write_lines(tmp_path / f"{name}.jsonl", ROWS[COMPLETIONS][:1])
    stream = read_stream(read_pieces(f"hf:{tmp_path}"), tokenizer, limit=10**9)
    assert stream.tokens.tolist() == of_mlx_lm(ROWS[COMPLETIONS][:1], tokenizer, False)[0][0]
    assert has_split(f"hf:{tmp_path}", "valid")


# ---------------------------------------------------------------------------------------------------
# Templates


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "the chat template failed on"),
        ("{{ messages.pop() }}", "the chat template failed on"),  # the sandbox lets nothing change
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the chat template failed on"),
        ("{{ messages[5].content.x.y }}", "the chat template failed on"),
    ],
)
def test_a_bad_template_is_one_line(tmp_path: Path, template: str, says: str) -> None:
    tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    (tmp_path / "config.json").write_text("{}")
    bad = tokenizer_of(tmp_path, {"eos_token_id": 257})
    path = write_lines(tmp_path / "a.jsonl", ROWS[CONVERSATIONS])
    with pytest.raises(UserError, match=says) as error:
        read_stream(read_pieces(str(path)), bad, limit=10**9)
    assert "a.jsonl line 1" in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_without_a_template_is_one_line(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    plain = tokenizer_of(tmp_path, {"eos_token_id": 257})
    path = write_lines(tmp_path / "a.jsonl", ROWS[CONVERSATIONS])
    with pytest.raises(UserError, match=r"line 1 is a conversation, and the model's tokenizer has no chat template"):
        read_stream(read_pieces(str(path)), plain, limit=10**9)


# ---------------------------------------------------------------------------------------------------
# Streams and blocks


def test_kinds_are_counted_up_to_the_limit(tokenizer: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ROWS[TEXT])
    documents = ["prose", *read_pieces(str(path))]
    stream = read_stream(documents, tokenizer, limit=10)
    assert stream.kinds == {PROSE_KIND: 6, TEXT: 4} and stream.starts.tolist() == [0, 6]


def test_long_conversations_are_one_document(tokenizer: Any, tmp_path: Path) -> None:
    """Each message ends with the end-of-text token, which ends a document in a text only."""
    path = write_lines(tmp_path / "a.jsonl", ROWS[CONVERSATIONS])
    stream = read_stream(read_pieces(str(path)), tokenizer, limit=10**9)
    assert len(stream.starts) == len(ROWS[CONVERSATIONS]) < (stream.tokens == tokenizer.eos_token_id).sum()
    text = read_stream(["one</s>two", "three"], tokenizer, limit=10**9)
    assert text.starts.tolist() == [0, 4, 8]


def test_a_block_that_begins_with_the_first_token_gets_no_second_one() -> None:
    tokens = np.array([9, 1, 2, 3, 9, 4, 5, 6, 9], np.int32)
    blocks = Blocks(tokens, 4, seed=0, first=9)
    assert sorted(blocks.batch(0, 2).tolist()) == [[9, 1, 2, 3, 9], [9, 4, 5, 6, 9]]
    assert Blocks(tokens[:4], 4, seed=0, first=9).batch(0, 1).tolist() == [[9, 9, 1, 2, 3]]  # nothing follows


@pytest.mark.parametrize("first", [None, 9])
def test_the_counted_targets_of_a_block_are_those_of_its_tokens(first: int | None) -> None:
    tokens = np.arange(100, dtype=np.int32) + 100
    answers = (tokens % 3 == 0) & (tokens < 160)
    blocks = Blocks(tokens, 7, seed=1, first=first, answers=answers)
    assert 0 < blocks.count < 14  # blocks without an answer are left out
    for number in range(2 * blocks.count):
        targets = blocks.batch(number, 1)[0, 1:]
        assert (blocks.counted(number, 1)[0] == ((targets % 3 == 0) & (targets < 160))).all()
        assert blocks.counted(number, 1).any()
    with pytest.raises(UserError, match="holds no answer"):
        Blocks(tokens, 7, seed=1, answers=np.zeros(100, bool))
