"""Named evaluation sets from the hub, through the extra `datasets`: a table, and one function per set."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import UserError, one_line

LETTERS = "ABCDE"
CONVERTED = "refs/convert/parquet"  # the branch with the rows of a set that is a script
Row = Mapping[str, Any]


@dataclass(frozen=True)
class HubSet:
    """The place of a set on the hub, and how a row becomes an item ({query, choices, gold} or {text})."""

    repository: str
    config: str | None
    split: str
    item: Callable[[Row], dict[str, Any]]


def _clean(text: str) -> str:
    """Text without the marks of WikiHow's pages; spaces are as in lm-evaluation-harness."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _hellaswag(row: Row) -> dict[str, Any]:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {"query": _clean(context), "choices": [_clean(e) for e in row["endings"]], "gold": int(row["label"])}


def _question(question: str, choices: Iterable[str], gold: int) -> dict[str, Any]:
    return {"query": f"Question: {question}\nAnswer:", "choices": list(choices), "gold": gold}


def _piqa(row: Row) -> dict[str, Any]:
    return _question(row["goal"], [row["sol1"], row["sol2"]], int(row["label"]))


def _arc(row: Row) -> dict[str, Any]:
    return _question(row["question"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))


def _openbookqa(row: Row) -> dict[str, Any]:
    choices = row["choices"]
    return {
        "query": row["question_stem"],
        "choices": choices["text"],
        "gold": choices["label"].index(row["answerKey"].strip()),
    }


def _boolq(row: Row) -> dict[str, Any]:
    query = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return {"query": query, "choices": ["no", "yes"], "gold": int(row["answer"])}


def _siqa(row: Row) -> dict[str, Any]:
    query = f"Q: {row['context']} {row['question']}\nA:"
    return {"query": query, "choices": [row[f"answer{x}"] for x in "ABC"], "gold": int(row["label"]) - 1}


def _mmlu(row: Row) -> dict[str, Any]:
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=False))
    subject = str(row.get("subject") or "").replace("_", " ")
    about = f"The following are multiple choice questions (with answers) about {subject}.\n\n" if subject else ""
    query = f"{about}{row['question'].strip()}\n{listed}\nAnswer:"
    return {"query": query, "choices": list(LETTERS[: len(row["choices"])]), "gold": int(row["answer"])}


def _mathqa(row: Row) -> dict[str, Any]:
    """A choice ends at its first comma, as in lm-evaluation-harness, and the last one at the end of the text.

    If that does not give five choices, each ends before the next letter.
    """
    pairs = re.findall(r"[abcd] \) (.*?), |e \) (.*)$", row["options"])
    choices = [(other or last).rstrip(" ,") for other, last in pairs]
    if len(choices) != len(LETTERS) or not all(choices):
        choices = [text.strip(" ,") for text in re.findall(r"[abcde] ?\) ?(.*?)(?=, ?[abcde] ?\)|$)", row["options"])]
    return _question(row["Problem"], choices, "abcde".index(row["correct"]))


def _lambada(row: Row) -> dict[str, Any]:
    return {"text": row["text"]}


SETS: dict[str, HubSet] = {
    "hellaswag": HubSet("Rowan/hellaswag", None, "validation", _hellaswag),
    "piqa": HubSet("baber/piqa", None, "validation", _piqa),
    "arc_easy": HubSet("allenai/ai2_arc", "ARC-Easy", "test", _arc),
    "arc_challenge": HubSet("allenai/ai2_arc", "ARC-Challenge", "test", _arc),
    "openbookqa": HubSet("allenai/openbookqa", "main", "test", _openbookqa),
    "boolq": HubSet("google/boolq", None, "validation", _boolq),
    "siqa": HubSet("allenai/social_i_qa", None, "validation", _siqa),
    "mmlu": HubSet("cais/mmlu", "all", "test", _mmlu),
    "mathqa": HubSet("allenai/math_qa", None, "test", _mathqa),
    "lambada": HubSet("EleutherAI/lambada_openai", "default", "test", _lambada),
}


def load_set(name: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The items of a named set, at most `limit`; UserError for an unknown name, no extra, or no connection."""
    if name not in SETS:
        raise UserError(f"hf:{name} is not a known set: choose from {', '.join(sorted(SETS))}")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UserError(f"hf:{name} needs the extra `datasets`: pip install 'mlx-linearard[datasets]'") from None
    where = SETS[name]
    try:
        rows = _rows(datasets, where)
    except Exception as error:  # the hub's client raises many types, for a wrong name or no network
        raise UserError(f"hf:{name} cannot be loaded from {where.repository}: {one_line(error)}") from None
    try:
        return [where.item(row) for row, _ in zip(rows, range(limit if limit is not None else len(rows)), strict=False)]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where.repository} does not have the expected columns: {one_line(repr(error))}") from None


def _rows(datasets: Any, where: HubSet) -> Any:
    """The rows of a set. If the set is a script, which `datasets` does not run: the rows that the hub converted."""
    try:
        return datasets.load_dataset(where.repository, where.config, split=where.split)
    except RuntimeError as error:
        if "script" not in str(error).lower():
            raise
        return datasets.load_dataset(where.repository, where.config, split=where.split, revision=CONVERTED)
