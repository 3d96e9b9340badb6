"""The long part of a step: its blocks, its losses, its memory, and that a stopped run continues bit for bit."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import yaml
from tiny import tiny_model
from tiny_runs import Stopped, StopsAt, metrics, same_adapters, small

import mlx_linearard
from mlx_linearard.config import DistillConfig, read_yaml
from mlx_linearard.config.options import LONG_OBJECTIVE
from mlx_linearard.distill.compare import compare_objectives
from mlx_linearard.distill.listener import Listener
from mlx_linearard.distill.long import LongPart
from mlx_linearard.distill.long_text import LongBlocks, LongSizes, length_around, pairs_of, passages_of, short_windows
from mlx_linearard.distill.memory import plan_memory
from mlx_linearard.distill.objective import resolve_objective
from mlx_linearard.distill.plan import inspect_model, plan_run
from mlx_linearard.distill.prepare import make_plan
from mlx_linearard.distill.step import Schedule, TrainState, train_step
from mlx_linearard.errors import UserError
from mlx_linearard.machine import Machine, on_gpu
from mlx_linearard.models.adapters import put
from mlx_linearard.models.pair import Pair, load_pair

END = 257


def stream(*lengths: int) -> np.ndarray:
    """Documents of so many tokens, each ended by END; tokens count up within a document."""
    return np.concatenate([[*range(n - 1), END] for n in lengths]).astype(np.int32)


def begins(*lengths: int) -> np.ndarray:
    """Where each of those documents begins."""
    return np.cumsum([0, *lengths[:-1]])


# ---------------------------------------------------------------------------------------------------
# Blocks


def test_blocks_lie_inside_documents_that_are_long_enough() -> None:
    blocks = LongBlocks.of(stream(10, 100, 20, 70), 30, 0, begins(10, 100, 20, 70))
    for number in range(2 * len(blocks.starts)):
        block = blocks.block(number)[0]
        assert len(block) == 31
        assert END not in block[:-1]
    assert len(blocks.starts) == 3 + 2


def test_blocks_cross_documents_if_none_is_long_enough() -> None:
    assert len(LongBlocks.of(stream(10, 10, 10, 10), 15, 0, begins(10, 10, 10, 10)).starts) == 2
    assert len(LongBlocks.of(stream(40), 15, 0, begins(40)).starts) == 2


def test_every_block_is_read_once_per_epoch_in_an_order_of_its_own() -> None:
    blocks = LongBlocks.of(stream(400), 15, 3, begins(400))
    count = len(blocks.starts)
    epochs = [[int(blocks.block(e * count + i)[0, 0]) for i in range(count)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    again = LongBlocks.of(stream(400), 15, 3, begins(400))
    assert np.array_equal(again.block(count + 4), blocks.block(count + 4))


def test_too_little_long_text_is_refused() -> None:
    with pytest.raises(UserError, match="too few for one block of 41"):
        LongBlocks.of(stream(40), 40, 0, begins(40))


@pytest.mark.parametrize(
    ("objective", "length", "passage", "expected"),
    [
        ("ce", 16384, None, LongSizes(16384)),
        ("longce", 16384, None, LongSizes(16384, window=8192)),
        ("longce", 9000, None, LongSizes(9000, window=4500)),
        ("recall", 16384, None, LongSizes(16384, passages=8, passage=256)),
        ("ce+recall", 16384, 1024, LongSizes(16384, passages=2, passage=1024)),
        ("longce+recall", 32768, None, LongSizes(32768, 8192, 16, 256)),
        ("recall", 16, None, LongSizes(16, passages=1, passage=2)),
    ],
)
def test_the_sizes_of_a_block(objective: str, length: int, passage: int | None, expected: LongSizes) -> None:
    sizes = LongSizes.of(objective, length, 8192, passage)
    assert sizes == expected
    assert len(sizes.rows()) == len(sizes.teacher_rows(None)) == sizes.recalled


@pytest.mark.parametrize(("native", "passage"), [(8192, None), (512, None), (8192, 1000), (20, None)])
@pytest.mark.parametrize("objective", ["ce", "longce", "recall", "ce+recall", "longce+recall"])
def test_a_default_block_has_its_text_in_full(objective: str, native: int, passage: int | None) -> None:
    """No distance in the long text is left without its own loss because passages take the end of the block."""
    length = length_around(objective, 2 * native, native, passage)
    assert LongSizes.of(objective, length, native, passage).text == 2 * native
    assert (length > 2 * native) == ("recall" in objective) and 7 * length <= 8 * 2 * native


@pytest.mark.parametrize("first", [None, 256])
def test_passages_stand_in_the_text_and_again_at_the_end(first: int | None) -> None:
    """Student and teacher are compared where both have read the same tokens of the second occurrence."""
    sizes = LongSizes.of("recall", 400, 128, 20)
    blocks = LongBlocks.of(np.arange(3000, dtype=np.int32), sizes.text, 0, begins(3000), first)
    text, passages = blocks.block(5)[0], passages_of(blocks, 5, sizes)
    assert passages.shape == (2, 20) and np.array_equal(passages, passages_of(blocks, 5, sizes))
    assert not np.array_equal(passages, passages_of(blocks, 6, sizes))
    for passage in passages:  # tokens count up, so a passage stands where its first token is
        place = int(np.flatnonzero(text == passage[0])[0])
        assert np.array_equal(text[place : place + 20], passage)
    assert abs(int(passages[0][0]) - int(passages[1][0])) >= 20
    tokens, pairs = np.concatenate([text, passages.reshape(-1)]), pairs_of(passages, first)
    assert len(tokens) == 401 and (first is None or (pairs[:, 0] == first).all())
    student, teacher = tokens[sizes.rows()], pairs.reshape(-1)[sizes.teacher_rows(first)]
    assert np.array_equal(student, teacher) and np.array_equal(student, passages[:, 4:-1].reshape(-1))
    assert tokens[sizes.rows()[0] - 4] == passages[0][0], "the last occurrence, not the first"


@pytest.mark.parametrize("first", [None, 256])
def test_short_windows_give_every_token_at_least_half_a_window(first: int | None) -> None:
    text = np.arange(203, dtype=np.int32)
    windows, rows = short_windows(text, 50, first)
    assert windows.shape == (8, 50) and len(rows) == 203
    for position, row in enumerate(rows):
        window, place = divmod(int(row), 50)
        assert windows[window, place] == (position if place or first is None else first)
        assert place >= min(position, 25 - 1)


# ---------------------------------------------------------------------------------------------------
# The losses

EVERY = ["ce", "longce", "recall", "ce+recall", "longce+recall"]


def nll_of(model: nn.Module, tokens: mx.array) -> mx.array:
    """The negative log-likelihood of each token but the first."""
    return nn.losses.cross_entropy(model(tokens[None, :-1]), tokens[None, 1:])[0]


def predicting(name: str, pair: Pair, text: mx.array) -> mx.array:
    """The definition of ce and longce on a text, one pass of the teacher for each token."""
    nll = nll_of(pair.student, text)[: len(text) - 1]
    if "longce" not in name:
        return nll.mean()
    window, short = (len(text) - 1) // 2, []
    for position in range(len(text) - 1):
        # Windows begin at multiples of half a window, and the last one ends with the text.
        behind = 0 if position < window else -(-(position - window + 1) // (window // 2)) * (window // 2)
        start = min(behind, len(text) - 1 - window)
        short.append(nll_of(pair.teacher, text[start : position + 2])[-1])
    weights = mx.stop_gradient(mx.minimum(mx.exp(mx.stack(short) - nll), 5.0))
    return (weights * nll).sum() / weights.sum()


def recalling(pair: Pair, text: mx.array, passages: list[mx.array]) -> mx.array:
    """The definition of recall: KL(teacher || student) after each cue, one passage after another."""
    log_s = nn.log_softmax(pair.student(mx.concatenate([text, *passages])[None]))[0]
    found = []
    for number, passage in enumerate(passages):
        log_t = nn.log_softmax(pair.teacher(mx.concatenate([passage, passage])[None]))[0]
        length, cue = len(passage), min(16, len(passage) // 4)
        for place in range(cue - 1, length - 1):
            t, s = log_t[length + place], log_s[len(text) + number * length + place]
            found.append((mx.exp(t) * (t - s)).sum())
    return mx.stack(found).mean()


def long_part(model_dir: Path, objective: str, length: int, tokens: np.ndarray, **options: object) -> LongPart:
    config = DistillConfig(model=str(model_dir), **{"long_weight": 0.3, "long_objective": objective, **options})
    sizes = LongSizes.of(objective, length, 128, config.recall_passage)
    return LongPart.of(config, sizes, LongBlocks(tokens, sizes.text, 0, np.array([0])))


@pytest.mark.parametrize("objective", EVERY)
def test_the_loss_and_the_update_are_those_of_the_weighted_sum(model_dir: Path, objective: str) -> None:
    pair = load_pair(model_dir, method="yarn", factor=4.0, lora_rank=4)
    mx.random.seed(1)
    start = [{k: v + 0.05 * mx.random.normal(v.shape) for k, v in leaves.items()} for leaves in pair.parameters()]
    pair.set_parameters(start)
    tokens = np.array([(7 * i * i + 3 * i) % 256 for i in range(1000)], np.int32)
    short = mx.array(tokens[None, :33])  # the native window is 128
    options = {"recall_weight": 0.5} if "+" in objective else {}
    part = long_part(model_dir, objective, 96 if "longce" in objective else 200, tokens, **options)
    text = mx.array(part.blocks.block(0)[0])
    passages = [mx.array(p) for p in passages_of(part.blocks, 0, part.sizes)] if "recall" in objective else []
    terms = {"ce" if "longce" not in objective else "longce": lambda: predicting(objective, pair, text)}
    terms = (terms if objective != "recall" else {}) | (
        {"recall": lambda: recalling(pair, text, passages)} if passages else {}
    )
    assert list(terms) == objective.split("+")

    def definition(parameters: list[dict[str, mx.array]]) -> mx.array:
        """KL of the logits on the short text, plus 0.3 times the long loss."""
        own = pair.parameters()
        for index, leaves in zip(pair.adapter.layers, parameters, strict=True):
            put(pair.student.layers[index], leaves)
        log_s, log_t = nn.log_softmax(pair.student(short[:, :-1])), nn.log_softmax(pair.teacher(short[:, :-1]))
        kl = (mx.exp(log_t) * (log_t - log_s)).sum(-1).mean()
        long = sum(w * term() for w, term in zip([1.0, 0.5], terms.values(), strict=False))
        pair.set_parameters(own)
        return kl + 0.3 * long

    expected, gradients = mx.value_and_grad(definition)(start)
    schedule = Schedule(4, 1, 1, 1e-3, 0, 0.0, 0.0, 0)
    state = TrainState.start(pair, schedule)
    record = train_step(pair, resolve_objective(pair.student, "logits"), schedule, state, [short], long=part)
    assert record.loss == pytest.approx(float(expected.item()), rel=1e-5)
    assert record.loss == pytest.approx(record.parts["logits"] + 0.3 * record.parts["long"], rel=1e-6)
    squares = sum(float((g * g).sum().item()) for leaves in gradients for g in leaves.values())
    assert record.grad_norm == pytest.approx(squares**0.5, rel=1e-4)
    assert record.tokens == 32 + part.sizes.seq_len
    if "+" in objective:
        found = [record.parts[f"long_{term}"] for term in terms]
        assert record.parts["long"] == pytest.approx(found[0] + 0.5 * found[1], rel=1e-6)
        assert found == pytest.approx([float(term().item()) for term in terms.values()], rel=1e-5)


@pytest.mark.parametrize("objective", EVERY)
def test_the_teacher_reads_nothing_beyond_its_window(model_dir: Path, objective: str, monkeypatch) -> None:
    """In the gradient it does not run at all, and before it no sequence is longer than the window."""
    pair = load_pair(model_dir, method="yarn", factor=4.0, lora_rank=4)
    tokens = np.arange(1000, dtype=np.int32) % 256
    part = long_part(model_dir, objective, 400, tokens)
    lengths, read = [0], LongPart._teacher
    monkeypatch.setattr(
        LongPart, "_teacher", lambda self, pair, t: (lengths.append(t.shape[1]), read(self, pair, t))[1]
    )
    batch = part.batch(pair, 0)
    assert max(lengths) <= 128 and (max(lengths) > 0) == (objective != "ce")
    before = part.loss(pair, pair.parameters(), batch)[0]
    for layer in pair.teacher.layers:
        layer.mlp = None
    after = part.loss(pair, pair.parameters(), batch)[0]
    assert before.item() == after.item()


# ---------------------------------------------------------------------------------------------------
# Runs

LONG = {"method": "yarn", "objective": "logits", "long_weight": 0.5, "long_seq_len": 200, "long_objective": "ce"}


@pytest.mark.parametrize(
    ("objective", "long"),
    [("logits", "ce"), ("relation", "ce"), ("ce", "ce"), ("logits", "longce"), ("logits", "ce+recall")],
)
def test_a_run_trains_both_parts_and_says_so(
    model_dir: Path, text_file: Path, tmp_path: Path, objective: str, long: str
) -> None:
    options = {**LONG, "objective": objective, "long_objective": long, "long_weight": 5.0}
    options |= {"recall_weight": 1.0} if "+" in long else {}
    result = mlx_linearard.distill(small(model_dir, text_file, tmp_path / "run", **options))
    lines = metrics(tmp_path / "run")
    assert result.steps == 8 and all(line["long"] > 0 and line["tokens"] == 264 for line in lines)
    names = [f"long_{term}" for term in long.split("+")] if "+" in long else ["long"]
    assert all(lines[-1][name] < lines[0][name] for name in names)
    assert json.loads((tmp_path / "run" / "adapters" / "adapter_config.json").read_text())["num_layers"] == 3


def test_a_stopped_run_continues_bit_for_bit(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    options = {**LONG, "lora_dropout": 0.1, "save_every": 3}
    mlx_linearard.distill(small(model_dir, text_file, straight, **options))
    with pytest.raises(Stopped):
        mlx_linearard.distill(small(model_dir, text_file, stopped, **options), StopsAt(5))
    mlx_linearard.distill(small(model_dir, text_file, stopped, **options, resume=True))
    assert same_adapters(straight, stopped)
    assert [line["loss"] for line in metrics(straight)] == [line["loss"] for line in metrics(stopped)]


KILLED = """
import os, signal, sys
import mlx_linearard
from mlx_linearard.config import DistillConfig, read_yaml
from mlx_linearard.distill.long import LongLoss
blocks, call = [], LongLoss.__call__
def killed(loss, *arguments):
    blocks.append(None)
    if len(blocks) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(loss, *arguments)
LongLoss.__call__ = killed
mlx_linearard.distill(DistillConfig(**read_yaml(sys.argv[1])))
"""


def test_a_run_killed_in_a_long_block_continues_bit_for_bit(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """SIGKILL in the fifth block, after a checkpoint of step 3 and a line of step 4."""
    straight, run = tmp_path / "straight", tmp_path / "run"
    options = {**LONG, "long_objective": "longce+recall", "lora_dropout": 0.1, "save_every": 3}
    mlx_linearard.distill(small(model_dir, text_file, straight, **options))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(asdict(small(model_dir, text_file, run, **options))))
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run.yaml")], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and len(metrics(run)) == 4, done.stderr
    mlx_linearard.distill(small(model_dir, text_file, run, **options, resume=True))
    assert same_adapters(straight, run)
    assert [line["loss"] for line in metrics(straight)] == [line["loss"] for line in metrics(run)]


def test_another_long_part_is_another_run(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    mlx_linearard.distill(small(model_dir, text_file, run, **LONG))
    with pytest.raises(UserError, match=r"long_weight was 0\.5 and is 0\.2"):
        mlx_linearard.distill(small(model_dir, text_file, run, **{**LONG, "long_weight": 0.2}, resume=True))
    with pytest.raises(UserError, match=r"long_objective was .ce. and is .longce."):
        mlx_linearard.distill(small(model_dir, text_file, run, **{**LONG, "long_objective": "longce"}, resume=True))
    other = tmp_path / "other.txt"
    other.write_text("Some other long text. " * 400)
    with pytest.raises(UserError, match="long_data"):
        mlx_linearard.distill(small(model_dir, text_file, run, **LONG, long_data=str(other), resume=True))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"long_seq_len": 200}, "--long-seq-len belong.*give --long-weight"),
        ({"long_objective": "recall"}, "--long-objective belong.*give --long-weight"),
        ({"long_weight": 0.2, "long_objective": "recall+ce"}, "must be one of ce, longce, recall, ce.recall"),
        ({"long_weight": 0.2, "long_objective": "ce", "recall_passage": 32}, "needs recall in --long-objective"),
        ({"long_weight": 0.2, "long_objective": "recall", "recall_weight": 2.0}, "give ce.recall or longce.recall"),
        ({"long_weight": 0.2, "long_objective": "recall", "recall_passage": 65}, "2 to 64 tokens"),
        ({"long_weight": 0.2, "long_objective": "recall", "long_seq_len": 15}, "at least 16 tokens"),
        ({"long_weight": 0.2, "long_seq_len": 1000}, "at most 512"),
        ({"long_weight": -1.0}, "negative"),
        ({"long_weight": 0.2, "long_data": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"method": "linear", "yarn_beta_fast": 12.0}, "ramp of yarn"),
        ({"method": "yarn", "yarn_beta_fast": 2.0, "yarn_beta_slow": 3.0}, "above beta_slow"),
    ],
)
def test_options_that_do_not_fit(model_dir: Path, text_file: Path, tmp_path: Path, options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        mlx_linearard.distill(small(model_dir, text_file, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_the_ramp_of_yarn_reaches_the_export(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    options = {"method": "yarn", "yarn_beta_fast": 12.0, "yarn_beta_slow": 6.0}
    mlx_linearard.distill(small(model_dir, text_file, tmp_path / "run", **options))
    for folder in ("model", "base"):
        config = json.loads((tmp_path / "run" / folder / "config.json").read_text())
        assert (config["rope_scaling"]["beta_fast"], config["rope_scaling"]["beta_slow"]) == (12.0, 6.0)


# ---------------------------------------------------------------------------------------------------
# A long part by default


@pytest.fixture
def by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_linearard.config.options.LONG_WEIGHT", 0.25)


@pytest.fixture
def at_any_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default long part is not left out because of its time, which depends on the machine's speed."""
    monkeypatch.setattr("mlx_linearard.distill.plan.MOST_LONG_TIMES", 1000)


class Says(Listener):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def prose(folder: Path, tokens: int) -> Path:
    """A text of so many bytes, each of which is a token."""
    file = folder / f"{tokens}.txt"
    file.write_text(("Far text is text that nobody sees any more. " * (tokens // 40 + 1))[:tokens])
    return file


@pytest.mark.usefixtures("by_default", "at_any_speed")
@pytest.mark.parametrize(
    ("tokens", "length", "says"),
    [
        (4000, 288, None),
        (260, 192, "the long text has 209 tokens: every step reads 192 of them"),
        (200, 0, "no long part: the text has 161 tokens, too few for a block longer than the native window of 128"),
    ],
)
def test_a_default_long_part_follows_the_text(
    model_dir: Path, tmp_path: Path, tokens: int, length: int, says: str | None
) -> None:
    """It is never a reason to refuse a run, a run that leaves it out resumes, and so does one that has it."""
    options = {"method": "yarn", "objective": "logits", "steps": 2, "eval_tokens": 32, "save_every": 1}
    options |= {"long_weight": None}
    config = small(model_dir, prose(tmp_path, tokens), tmp_path / "run", **options)
    said = Says()
    assert mlx_linearard.distill(config, said) is not None
    assert [line for line in said.lines if "long part" in line or "long text has" in line] == ([says] if says else [])
    written = read_yaml(tmp_path / "run" / "config.yaml")
    assert (written["long_weight"], written["long_seq_len"] or 0) == (0.25 if length else 0.0, length)
    assert all(("long" in line) == bool(length) for line in metrics(tmp_path / "run"))
    longer = dataclasses.replace(config, steps=3, resume=True)
    assert mlx_linearard.distill(longer) is not None and len(metrics(tmp_path / "run")) == 3


@pytest.mark.usefixtures("by_default")
def test_what_the_user_asks_for_is_not_left_out(model_dir: Path, tmp_path: Path) -> None:
    text = prose(tmp_path, 200)
    for given in ({"long_weight": 0.25}, {"long_seq_len": 256}, {"long_objective": "longce"}):
        with pytest.raises(UserError, match="the long text has 161 tokens, too few for one block"):
            mlx_linearard.distill(small(model_dir, text, tmp_path / "run", **{"long_weight": None, **given}))
    config = small(model_dir, text, tmp_path / "run", long_weight=0.0, eval_tokens=32)
    assert mlx_linearard.distill(config) is not None


@pytest.mark.usefixtures("by_default")
def test_a_default_long_part_follows_the_memory(text_file: Path, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", **WIDE)
    default = {"seq_len": 512, "long_weight": None, "long_seq_len": None, "long_objective": LONG_OBJECTIVE}
    plan = plan_of(folder, text_file, tmp_path, **default)
    assert plan.long_optional and plan.sizing.long_seq_len == 1152 and plan.config.long_weight == 0.25
    at_window = plan_memory(dataclasses.replace(plan.long_step, seq_len=512)).total
    without = plan_of(folder, text_file, tmp_path, at_window, **default)
    assert without.long_step is None and without.config.long_weight == 0.0
    assert any("no block longer than the native window of 512 tokens" in line for line in without.lines())
    with pytest.raises(UserError, match="--long-seq-len"):
        plan_of(folder, text_file, tmp_path, at_window, **{**default, "long_seq_len": 1024})


@pytest.mark.usefixtures("by_default")
def test_a_default_long_part_follows_the_time(tmp_path: Path) -> None:
    """A block of twice a large window takes many times as long as the short text. With --long-weight the run has it."""
    folder = tiny_model(tmp_path / "m", max_position_embeddings=32768)
    for weight, length in ((None, 0), (0.25, 74752)):
        config = small(folder, tmp_path / "no.txt", tmp_path / "run", seq_len=2048, long_weight=weight)
        plan = plan_run(config, inspect_model(config, folder), Machine("tiny", True, 1 << 40, 90000.0))
        assert plan.sizing.long_seq_len == length
        said = [line for line in plan.lines() if "as long as the rest of a step" in line]
        assert len(said) == (not length) and all("no long part: a block of 74752 tokens" in line for line in said)


@pytest.mark.usefixtures("by_default")
def test_a_slow_demonstration_has_no_long_part(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", **{**WIDE, "max_position_embeddings": 2048})
    config = DistillConfig(output=str(tmp_path / "run"))
    for speed, gpu, planned in ((100.0, False, 0), (90000.0, True, 4608)):
        plan = plan_run(config, inspect_model(config, folder), Machine("tiny", gpu, 1 << 40, speed))
        assert plan.sizing.long_seq_len == planned
        assert any("a demonstration on tiny would take too long" in line for line in plan.lines()) == (not planned)


@pytest.mark.usefixtures("by_default", "at_any_speed")
def test_a_comparison_has_the_default_long_part_and_resumes(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    options = {"method": "yarn", "steps": 2, "eval_tokens": 32, "long_weight": None}
    config = small(model_dir, text_file, tmp_path / "out", compare="logits,ce", **options)
    assert compare_objectives(config) is not None
    more = dataclasses.replace(config, compare="logits,ce,relation", resume=True)
    assert compare_objectives(more) is not None
    for name in ("logits", "ce", "relation"):
        assert all(line["long"] > 0 for line in metrics(tmp_path / "out" / name))


# ---------------------------------------------------------------------------------------------------
# The plan

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "max_position_embeddings": 512}


def plan_of(folder: Path, text: Path, tmp_path: Path, memory: int = 1 << 40, **options: object):
    machine = Machine("tiny", False, memory, 10.0)
    return make_plan(small(folder, text, tmp_path / "run", **{**LONG, "recompute": "all", **options}), machine)


def test_the_default_length_is_twice_the_native_window_or_what_fits(text_file: Path, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", **WIDE)
    plan = plan_of(folder, text_file, tmp_path, long_seq_len=None)
    assert plan.sizing.long_seq_len == 1024
    assert plan_of(folder, text_file, tmp_path, long_seq_len=None, factor=1.5).sizing.long_seq_len == 768
    smaller = plan_of(folder, text_file, tmp_path, plan.memory.total - 1, long_seq_len=None)
    assert plan_memory(smaller.step).total < smaller.memory.total < plan.memory.total
    assert smaller.sizing.long_seq_len < 1024
    with pytest.raises(UserError, match="--long-seq-len"):
        plan_of(folder, text_file, tmp_path, plan.memory.total - 1, long_seq_len=1024)


SLOW = pytest.mark.slow
LARGER = 2 if on_gpu() else 1  # a GPU is fast, and keeps small buffers


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(
    ("objective", "long"),
    [
        pytest.param("relation", "ce", marks=SLOW),
        ("logits", "ce"),
        pytest.param("logits", "longce", marks=SLOW),
        pytest.param("logits", "recall", marks=SLOW),
        ("logits", "longce+recall"),
    ],
)
def test_the_plan_of_a_long_part_is_near_the_peak(tmp_path: Path, text_file: Path, objective: str, long: str) -> None:
    folder = tiny_model(tmp_path / "m", **{**WIDE, "max_position_embeddings": 256 * LARGER})
    sizes = {"long_seq_len": 512 * LARGER, "workspace": 4 * LARGER}
    options = {"objective": objective, "long_objective": long, **sizes}
    plan = plan_of(folder, text_file, tmp_path, **options)
    pair = load_pair(folder, method="yarn", factor=4.0, lora_rank=4, dtype="float32")
    schedule = Schedule(4, 1, 2, 1e-3, 0, 0.0, 0.0, 0)
    state = TrainState.start(pair, schedule)
    tokens = np.arange(4000, dtype=np.int32) % 256
    blocks = LongBlocks(tokens, plan.sizing.long.text, 0, np.array([0, 1]))
    part = LongPart.of(plan.config, plan.sizing.long, blocks)
    target = dataclasses.replace(resolve_objective(pair.student, objective), workspace_bytes=sizes["workspace"] << 20)
    resident = mx.get_active_memory() - sum(a.nbytes for _, a in _arrays(pair))
    for _ in range(1 + LARGER):  # the second step has the optimizer's state
        batches = [mx.array(tokens[None, :33]), mx.array(tokens[None, 5:38])]
        peak = train_step(pair, target, schedule, state, batches, long=part).peak_memory
    assert plan.memory.total == pytest.approx(peak - max(0, resident), rel=0.2)


def _arrays(pair: Pair) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return tree_flatten([pair.teacher.parameters(), pair.parameters()])
