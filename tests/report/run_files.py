"""Run directories with everything that a report can show, and a reader of its page."""

from __future__ import annotations

import html.parser
import json
import random
import shutil
from pathlib import Path
from typing import Any

from mlx_linearard.config import OBJECTIVES
from mlx_linearard.results.rows import HELD_OUT
from mlx_linearard.results.statistics import compare_objectives

VOID = {"meta", "link", "br", "hr", "img", "input"}


def a_row(kl: float, short: float, long: float | None = None, **more: Any) -> dict[str, Any]:
    perplexity = {"2048": short} | ({} if long is None else {"16384": long})
    return {"perplexity": perplexity, "kl": kl, "agreement": 0.8, **more}


def a_run(root: Path, **changes: Any) -> Path:
    """A run directory with everything a report can show."""
    value = {"value": 0.5, "stderr": 0.1, "n": 25}
    test = {"a": "restored", "b": "scaled", "p": 0.3, "outcome": "inside the noise"}
    row = {**value, "percent_of_native": 96.0, "recovered": 88.0, "tests": [test]}
    suites = {
        "choice/piqa": {"metrics": {"acc_norm": value}},
        "passkey": {"metrics": {"accuracy": value}, "grid": {"4096": {"0": 1.0, "50": 0.25}}},
        "ppl": {
            "metrics": {"perplexity@256": value},
            "by_length": {"256": 30.0},
            "by_position": [
                {"start": 0, "end": 128, "perplexity": 40.0},
                {"start": 128, "end": 256, "perplexity": 20.0},
            ],
        },
    }
    results = {
        "native": a_row(0.0, 30.9, 57.2, **suites),
        "scaled": a_row(1.70, 164.3, 174.0),
        "restored": a_row(0.153, 34.2, 31.2, **suites),
        "comparisons": {"choice/piqa": {"metrics": {"acc_norm": {"restored": row}}}},
        "run": {
            "native_window": 8192,
            "factor": 4.0,
            "machine": "a <Mac>",
            "training_tokens": 1179648,
            "seconds": 700,
            "versions": {"mlx": "0.32.4"},
        },
        "export": {"kl": 1e-7},
    }
    root.mkdir(exist_ok=True)
    (root / "results.json").write_text(json.dumps({**results, **changes}))
    (root / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "loss": 2.0 / i, "peak_memory_gb": 0.5}) + "\n" for i in range(1, 31))
    )
    (root / "config.yaml").write_text(
        "model: models/<b>Smol & Co</b>\nmethod: linear\nfactor: 4.0\nobjective: relation\n"
    )
    return root


def a_comparison(root: Path) -> Path:
    """The directory of a finished --compare of all objectives."""
    a_run(root)
    results = json.loads((root / "results.json").read_text())
    kl = {"native": 0.0, "scaled": 1.7, "relation": 0.4, "logits": 0.3, "relation+logits": 0.31, "ce": 0.6}
    models = {name: {"kl": {str(i): mean * (1 + i % 5 / 5) for i in range(32)}} for name, mean in kl.items()}
    training = {"tokens": 18432, "seconds": 300.0, "tokens_per_second": 61.0, "peak_memory_gb": 0.8}
    rows = {name: a_row(kl[name], 30.0 + kl[name], training=training) for name in OBJECTIVES}
    results["comparisons"][HELD_OUT] = compare_objectives(models, OBJECTIVES).as_json()
    (root / "results.json").write_text(json.dumps({**results, **rows, "restored": rows["relation"]}))
    (root / "config.yaml").write_text(f"model: smol\nmethod: linear\nfactor: 4.0\ncompare: {','.join(OBJECTIVES)}\n")
    for name in OBJECTIVES:
        (root / name).mkdir()
        shutil.copy(root / "metrics.jsonl", root / name / "metrics.jsonl")
    (root / "metrics.jsonl").unlink()
    return root


class Page(html.parser.HTMLParser):
    """The tags and the text of a page; fails if tags are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "action", "srcset", "data")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def held_out(kl: dict[str, float], noise: float, length: int = 512) -> dict[str, Any]:
    """held_out.json: 8 windows of `length` tokens; the later pieces of a window are easier."""
    rng = random.Random(0)
    names = [f"{length}/{w}/{p}" for w in range(8) for p in range(length // 64)]
    return {
        model: {
            "kl": {name: mean + noise * rng.gauss(0, 1) for name in names},
            f"perplexity@{length}": {name: 4.0 - int(name.split("/")[2]) / 10 for name in names},
        }
        for model, mean in kl.items()
    }
