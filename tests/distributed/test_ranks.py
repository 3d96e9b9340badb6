"""A run that several processes share: the result of one process, and all processes end when one ends."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from launched import Launch, launch, launched
from tiny_runs import metrics, small

from mlx_linearard.cli import run_command
from mlx_linearard.distill import checkpoint
from mlx_linearard.distill.__main__ import run as command
from mlx_linearard.distill.plan import inspect_model, plan_run
from mlx_linearard.distill.sizing import size_run
from mlx_linearard.distributed import watchdog as watch
from mlx_linearard.distributed.ranks import ALONE, BUFFER_BYTES, Ranks, _buffers, joined
from mlx_linearard.distributed.watchdog import Witness
from mlx_linearard.errors import LOST_STATUS, LostProcess, UserError
from mlx_linearard.files import read_json
from mlx_linearard.machine import machine_of_speed
from mlx_linearard.models.adapters import drop_rows

linux = pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")

FLAGS = [
    "--seq-len", "32", "--lora-rank", "4", "--learning-rate", "2e-3", "--lora-dropout", "0.1", "--eval-tokens", "64",
]  # fmt: skip
TOLERANCE = 1e-5  # of a loss, in nats


def flags(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--data", str(text), "--output", str(output), *FLAGS, *more]


def assert_same_run(one: Path, other: Path) -> None:
    """Every step's loss, tokens and learning rate agree, and the adapters up to the rounding that AdamW amplifies."""
    a, b = metrics(one), metrics(other)
    assert [m["step"] for m in a] == [m["step"] for m in b] and a
    for x, y in zip(a, b, strict=True):
        assert abs(x["loss"] - y["loss"]) < TOLERANCE
        assert x["tokens"] == y["tokens"] and x["learning_rate"] == y["learning_rate"]
    left, right = (mx.load(str(run / "adapters" / "adapters.safetensors")) for run in (one, other))
    assert left.keys() == right.keys()
    assert all(mx.abs(left[name] - right[name]).max().item() < 1e-4 for name in left)


# ---------------------------------------------------------------------------------------------------
# Shares


@pytest.mark.parametrize(
    ("size", "accum", "batch"), [(1, 3, 5), (2, 4, 1), (2, 1, 4), (4, 2, 2), (4, 6, 2), (6, 4, 3), (8, 4, 6)]
)
def test_shares_cover_a_step_once_and_are_equally_large(size: int, accum: int, batch: int) -> None:
    seen = []
    for rank in range(size):
        share = Ranks(rank, size).share(accum, batch)
        rows = range(batch)[share.rows(batch)]
        seen.append(list(itertools.product(share.passes(accum), rows)))
    assert sorted(itertools.chain(*seen)) == list(itertools.product(range(accum), range(batch)))
    assert len({len(part) for part in seen}) == 1


@pytest.mark.parametrize(
    ("size", "accum", "batch", "fits"),
    [(2, 3, 1, "--grad-accum 4, or start one process"), (4, 3, 2, "--grad-accum 4, or start 3 processes"),
     (4, 1, 6, "--grad-accum 2, or start 3 processes")],
)  # fmt: skip
def test_blocks_that_do_not_go_round_are_refused_with_what_would(size: int, accum: int, batch: int, fits: str) -> None:
    with pytest.raises(UserError, match=f"{size} processes .* {accum * batch} blocks .*{fits}$"):
        Ranks(0, size).share(accum, batch)
    number = int(fits.split()[1].rstrip(","))
    Ranks(0, size).share(number, batch)


def test_dropout_of_rows_is_that_of_the_whole_batch() -> None:
    x = mx.random.normal((6, 5, 8))

    def dropped(part: int, parts: int) -> mx.array:
        student = nn.Module()
        layer = nn.Module()
        layer.dropout = nn.Dropout(0.3)
        student.layers = [layer]
        if parts > 1:
            drop_rows(student, part, parts)
        mx.random.seed(9)
        rows = 6 // parts
        return layer.dropout(x[part * rows : (part + 1) * rows])

    whole = dropped(0, 1)
    assert (whole == 0).any().item()
    assert mx.array_equal(mx.concatenate([dropped(part, 3) for part in range(3)]), whole).item()


def test_arrays_travel_in_few_buffers_of_one_dtype() -> None:
    large = BUFFER_BYTES // 4
    arrays = [
        mx.zeros(n, dtype) for n, dtype in [(3, mx.float32), (1, mx.uint64), (large, mx.float32), (2, mx.float32)]
    ]
    assert list(_buffers(arrays)) == [[0, 2], [3], [1]]


def test_the_time_is_that_of_the_machines_and_the_memory_that_of_a_share(model_dir: Path, text_file: Path) -> None:
    config = small(model_dir, text_file, Path("unused"), grad_accum=4, batch_size=2, steps=1000)
    native, machine = read_json(model_dir / "config.json"), machine_of_speed(100.0)
    apart, beside = (Ranks(0, 2, hosts) for hosts in (("a", "b"), ("a", "a")))
    alone, two, same = (size_run(config, native, machine, ranks) for ranks in (ALONE, apart, beside))
    assert alone.tokens_per_step == two.tokens_per_step and alone.processes == 1 and two.processes == 2
    assert two.times.training == pytest.approx(alone.times.training / 2, rel=0.1)
    assert "shared by 2 processes" in next(itertools.islice(two.lines(machine), 1, None))
    assert (
        beside.on_this_host == 2
        and apart.on_this_host == 1
        and machine_of_speed(1.0, 2).memory == machine_of_speed(1.0).memory // 2
    )
    if not mx.cuda.is_available():
        assert same.times == alone.times
    step = plan_run(config, inspect_model(config, model_dir), machine, Ranks(0, 8, ("a",) * 8)).step
    assert (step.grad_accum, step.batch) == (1, 1)


@pytest.mark.parametrize("weight", [None, 0.2])
def test_rows_that_are_shared_with_dropout_have_no_long_part(
    model_dir: Path, text_file: Path, weight: float | None
) -> None:
    """A default long part is left out. With --long-weight, the run ends in an error that names the remedy."""
    options = {"grad_accum": 1, "batch_size": 16, "long_weight": weight, "lora_dropout": 0.1}
    config = small(model_dir, text_file, Path("unused"), **options)
    inspected, machine = inspect_model(config, model_dir), machine_of_speed(100.0)
    assert plan_run(config, inspected, machine).sizing.long
    four = Ranks(0, 4, ("a",) * 4)
    if weight:
        with pytest.raises(UserError, match="--long-weight: with --lora-dropout it needs"):
            plan_run(config, inspected, machine, four)
    else:
        plan = plan_run(config, inspected, machine, four)
        assert plan.sizing.long is None and "with --lora-dropout it needs" in str(plan.note)


def test_one_process_is_alone_whatever_it_asks() -> None:
    with joined() as ranks:
        assert ranks is ALONE and ranks.leads
    tree = {"a.b": mx.ones(2)}
    assert ranks.mean(tree) is tree and ranks.arrays_from_first(tree) is tree
    assert ranks.gather(3) == [3] and ranks.from_first(4) == 4 and ranks.any(True) and not ranks.any(False)


# ---------------------------------------------------------------------------------------------------
# Who tells


def test_the_first_of_those_that_are_left_tells() -> None:
    first = Witness.create()
    others = [Witness.open(first.path) for _ in range(2)]
    first.hide()
    assert not Path(first.path).exists()
    os.close(first.handle)  # as the system does when it is killed
    assert [other.claim_report() for other in others] == [True, False]


def test_nobody_tells_what_the_first_has_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PATIENCE", 0.2)
    first = Witness.create()
    other = Witness.open(first.path)
    first.hide()
    assert not other.claim_report()  # it is still there, and may
    assert first.claim_report() and not other.claim_report()
    os.close(first.handle)
    assert not other.claim_report()


def test_a_lost_process_is_one_line_and_a_status_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        raise LostProcess("another has\nended")

    assert run_command(body) == LOST_STATUS
    assert capsys.readouterr().err == "error: another has ended\n"


# ---------------------------------------------------------------------------------------------------
# The same result


@pytest.fixture(scope="module")
def alone(model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of one process with these flags, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*more: str) -> Path:
        if more not in made:
            made[more] = tmp_path_factory.mktemp("alone") / "run"
            assert command(flags(model_dir, text_file, made[more], *more)) == 0
        return made[more]

    return run


PASSES = ("--grad-accum", "4", "--steps", "8", "--eval-every", "3")
ROWS = ("--grad-accum", "1", "--batch-size", "4", "--steps", "8", "--objective", "relation+logits")
BOTH = ("--grad-accum", "2", "--batch-size", "2", "--steps", "8", "--objective", "ce", "--fine-tune-type", "dora")
SHORT = ("--long-weight", "0")  # with dropout, processes that share rows have no long part
FAR = ("--method", "yarn", "--long-weight", "0.5", "--long-objective", "longce+recall", "--long-seq-len", "200")


@pytest.mark.parametrize(
    ("size", "more"),
    [
        pytest.param(2, PASSES, id="2 by passes"),
        pytest.param(2, (*PASSES, *FAR), id="2 with a long part", marks=pytest.mark.slow),
        pytest.param(4, PASSES, id="4 by passes", marks=pytest.mark.slow),
        pytest.param(4, (*ROWS, *SHORT), id="4 by rows", marks=pytest.mark.slow),
        pytest.param(4, (*BOTH, *SHORT), id="4 by both", marks=pytest.mark.slow),
    ],
)
def test_processes_together_train_what_one_does(
    alone: Callable[..., Path], model_dir: Path, text_file: Path, tmp_path: Path, size: int, more: tuple[str, ...]
) -> None:
    one, run = alone(*more), tmp_path / "run"
    done = launched(size, flags(model_dir, text_file, run, *more))
    assert done.statuses() == {} and done.errors() == [], done.err
    assert_same_run(one, run)
    assert done.out.count(f"shared by {size} processes") == 1 == done.out.count("The state after step ")
    assert {p.relative_to(run) for p in run.rglob("*")} == {p.relative_to(one) for p in one.rglob("*")}
    facts, single = (read_json(path / "results.json")["run"] for path in (run, one))
    assert facts["processes"] == size and single["processes"] == 1
    assert facts["training_tokens"] == single["training_tokens"]


@pytest.mark.slow
def test_a_bad_batch_at_one_rank_is_skipped_by_all(
    alone: Callable[..., Path], model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """If any rank had made the update, or kept its learning rate, the later losses would differ from one process's."""
    patch = """
    import math
    from mlx_linearard.distill import gradient as trainer
    real, count = trainer.objective_loss, [0]
    def loss(pair, objective, parameters, tokens, seed, *more):
        total, parts = real(pair, objective, parameters, tokens, seed, *more)
        return (total * math.nan if seed == 3 * 4 + 2 else total), parts
    trainer.objective_loss = loss
    """
    runs = []
    for size in (1, 2):
        runs.append(tmp_path / str(size))
        done = launched(size, flags(model_dir, text_file, runs[-1], *PASSES), patched(patch))
        assert done.statuses() == {}, done.err
    assert_skips = [[m["step"] for m in metrics(run) if m.get("skipped") == "loss not finite"] for run in runs]
    assert assert_skips == [[4], [4]]
    for x, y in zip(*map(metrics, runs), strict=True):
        assert x.get("rate_factor") == y.get("rate_factor")
        assert x["loss"] == y["loss"] is None or abs(x["loss"] - y["loss"]) < TOLERANCE


def patched(text: str) -> tuple[str, str]:
    """The command after the code `text` has replaced a part of it."""
    lines = "\n".join(line[4:] for line in text.splitlines())
    return "-c", f"{lines}\nfrom mlx_linearard.distill.__main__ import main\nmain()\n"


# ---------------------------------------------------------------------------------------------------
# A rank that dies

LONG = ("--grad-accum", "4", "--steps", "50", "--save-every", "2", "--eval-every", "20", "--keep", "last")
LIMIT = 30.0  # seconds


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step-*"))


def assert_ended(done: Launch, run: Path, lost: int, seconds: float) -> int:
    """All ranks end in time with the right status, and one line says how to continue. Returns the step of that line."""
    assert seconds < LIMIT
    assert done.statuses() == {rank: -signal.SIGKILL if rank == lost else LOST_STATUS for rank in range(done.size)}
    assert len(done.errors()) == 1 and done.errors()[0].startswith("error: "), done.err
    assert "continue with the same command and --resume" in done.errors()[0]
    last = checkpoint.list_checkpoints(run / "checkpoints")[-1]
    assert str(last) in done.errors()[0]
    arrays = mx.load(str(last / checkpoint.ARRAYS))
    assert all(mx.isfinite(array).all().item() for array in arrays.values())
    return checkpoint.read_facts(last)["step"]


@linux
@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_killed_at_random_instants_end_the_run_and_it_resumes(
    alone: Callable[..., Path], model_dir: Path, text_file: Path, tmp_path: Path, size: int
) -> None:
    """Any rank; every other time the first one, during a save. The last launch has another number of ranks."""
    seeded, run, inside = random.Random(size), tmp_path / "run", 0
    arguments = flags(model_dir, text_file, run, *LONG)
    for number, step in enumerate(sorted(seeded.sample(range(5, 40), 4))):
        lost = seeded.randrange(1, size) if number % 2 else 0
        step = max(step, lines_in(run / "metrics.jsonl") + 1)  # one that only this launch can have made
        with launch(size, arguments) as started:
            started.until(lambda step=step: lines_in(run / "metrics.jsonl") >= step)
            victim = started.pids()[lost]
            if lost == 0:
                started.until(lambda: is_saving(run))
            else:
                time.sleep(seeded.uniform(0, 0.05))
            os.kill(victim, signal.SIGKILL)
            inside += is_saving(run)
            seconds = started.wait()
        saved = assert_ended(started, run, lost, seconds)
        if lost:
            assert saved == lines_in(run / "metrics.jsonl")  # the first rank lived, and lost no step
        arguments = [*flags(model_dir, text_file, run, *LONG), "--resume"]
    assert inside, "no kill hit a save"
    assert command(arguments) == 0
    assert_same_run(alone(*LONG), run)


BUSY = {
    "evaluates": """
    import time
    from mlx_linearard.distill.prepare import Job
    real = Job.measure
    Job.measure = lambda job, state: time.sleep(300) if state.step == 3 else real(job, state)
    """,
    "computes": """
    import os, time
    from mlx_linearard.distill import step as trainer
    real = trainer._accumulate
    def accumulate(pair, objective, schedule, state, *rest):
        if state.step == 3 and os.environ["MLX_RANK"] == "0":
            time.sleep(300)
        return real(pair, objective, schedule, state, *rest)
    trainer._accumulate = accumulate
    """,
    "saves": """
    import time
    from mlx_linearard.distill import checkpoint
    real = checkpoint.write_json
    checkpoint.write_json = lambda path, facts: time.sleep(300) if facts["step"] == 3 else real(path, facts)
    """,
}


@linux
@pytest.mark.slow
@pytest.mark.parametrize("busy", BUSY)
@pytest.mark.parametrize("lost", [0, 2])
def test_a_first_rank_that_is_busy_for_minutes_ends_too(
    model_dir: Path, text_file: Path, tmp_path: Path, busy: str, lost: int
) -> None:
    """After step 3 of a run that evaluates and saves after each step, no long piece of work delays the end."""
    run = tmp_path / "run"
    more = ("--grad-accum", "3", "--steps", "9", "--eval-every", "1", "--save-every", "1")
    with launch(3, flags(model_dir, text_file, run, *more), patched(BUSY[busy])) as started:
        started.until(lambda: lines_in(run / "metrics.jsonl") >= 3)
        time.sleep(0.5)
        started.signal(lost, signal.SIGKILL)
        seconds = started.wait()
    saved = assert_ended(started, run, lost, seconds)
    assert saved == (3 if busy == "computes" or (busy == "evaluates" and lost) else 2)


@linux
@pytest.mark.slow
def test_a_rank_lost_before_the_first_step(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    slow = """
    import time
    from mlx_linearard.distill import run
    run.measure = lambda *a, **k: time.sleep(300)
    """
    run = tmp_path / "run"
    with launch(2, flags(model_dir, text_file, run, "--grad-accum", "2", "--steps", "3"), patched(slow)) as started:
        started.until(lambda: (run / "checkpoints").exists())
        started.signal(1, signal.SIGKILL)
        assert started.wait() < LIMIT
    assert started.statuses() == {0: LOST_STATUS, 1: -signal.SIGKILL}
    assert len(started.errors()) == 1 and started.errors()[0].endswith("continue with the same command and --resume")
    assert (
        launched(2, flags(model_dir, text_file, run, "--grad-accum", "2", "--steps", "3", "--resume")).statuses() == {}
    )


# ---------------------------------------------------------------------------------------------------
# A request to stop


@linux
@pytest.mark.slow
@pytest.mark.parametrize(("number", "rank"), [(signal.SIGINT, 1), (signal.SIGTERM, 0), (signal.SIGTERM, 2)])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    alone: Callable[..., Path], model_dir: Path, text_file: Path, tmp_path: Path, number: int, rank: int
) -> None:
    """All ranks stop after the same step, save, and end with 130; the run resumes with another number of ranks."""
    run, more = tmp_path / "run", LONG
    with launch(4, flags(model_dir, text_file, run, *more)) as started:
        started.until(lambda: lines_in(run / "metrics.jsonl") >= 7)
        started.signal(rank, number)
        assert started.wait() < LIMIT
    assert started.statuses() == dict.fromkeys(range(4), 130)
    assert started.errors() == ["stopped"]
    step = lines_in(run / "metrics.jsonl")
    assert f"stopped after step {step}, saved in" in started.out
    assert checkpoint.step_of(checkpoint.list_checkpoints(run / "checkpoints")[-1]) == step
    again = launched(2, flags(model_dir, text_file, run, *more, "--resume"))
    assert again.statuses() == {} and f"resuming after step {step} of" in again.out
    assert_same_run(alone(*more), run)


@pytest.mark.slow
def test_ctrl_c_in_the_terminal_saves(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """The signal reaches every rank, and mlx.launch, which then prints nothing."""
    run = tmp_path / "run"
    with launch(2, flags(model_dir, text_file, run, *LONG)) as started:
        started.until(lambda: lines_in(run / "metrics.jsonl") >= 7)
        os.killpg(started.process.pid, signal.SIGINT)
        assert started.wait() < LIMIT
    step = lines_in(run / "metrics.jsonl")
    assert 7 <= step < 50 and checkpoint.step_of(checkpoint.list_checkpoints(run / "checkpoints")[-1]) == step


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_is_gone_leaves_nobody_behind(
    model_dir: Path, text_file: Path, tmp_path: Path, number: int
) -> None:
    run = tmp_path / "run"
    with launch(2, flags(model_dir, text_file, run, *LONG, "--steps", "4000")) as started:
        started.until(lambda: lines_in(run / "metrics.jsonl") >= 3)
        os.kill(started.process.pid, number)
        started.process.wait()
        end = time.monotonic() + LIMIT
        while started._group() and time.monotonic() < end:
            time.sleep(0.1)
    assert checkpoint.step_of(checkpoint.list_checkpoints(run / "checkpoints")[-1]) == lines_in(run / "metrics.jsonl")


# ---------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        pytest.param(("--grad-accum", "3"), "2 processes cannot share the 3 blocks of a step evenly", id="share"),
        pytest.param(("--typo",), "unrecognized arguments: --typo", id="flag", marks=pytest.mark.slow),
        pytest.param(("--model", "/nowhere"), "/nowhere is not a model directory", id="model", marks=pytest.mark.slow),
        pytest.param(("--compare", "ce,logits"), "leave mlx.launch out", id="compare", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_is_told_once_and_ends_all(
    model_dir: Path, text_file: Path, tmp_path: Path, more: tuple[str, ...], complaint: str
) -> None:
    run = tmp_path / "run"
    done = launched(2, flags(model_dir, text_file, run, "--grad-accum", "2", *more))
    assert done.statuses() == {0: 2, 1: 2}, done.err
    assert len(done.errors()) == 1 and done.errors()[0].startswith("error: ") and complaint in done.errors()[0]
    assert not run.exists()


@pytest.mark.slow
def test_a_mistake_of_one_rank_is_told_by_it(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """The text of the second process is missing, or differs."""
    other = tmp_path / "other.txt"
    other.write_text("Another text, of which there is enough. " * 200)
    for name, complaint in (
        ("/nowhere", "/nowhere does not exist"),
        (str(other), "process 1 would not train the same"),
    ):
        elsewhere = f"""
    import os
    from mlx_linearard.distill import text
    real = text.read_pieces
    text.read_pieces = lambda name, *more: real({name!r} if os.environ["MLX_RANK"] == "1" else name, *more)
    """
        run = tmp_path / "run"
        done = launched(2, flags(model_dir, text_file, run, "--grad-accum", "2"), patched(elsewhere))
        assert done.statuses() == {0: 2, 1: 2}, done.err
        assert len(done.errors()) == 1 and complaint in done.errors()[0]
        assert not run.exists()


@pytest.mark.slow
def test_the_plan_and_the_help_are_told_once(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = launched(2, flags(model_dir, text_file, run, "--grad-accum", "2", "--dry-run"))
    assert done.statuses() == {} and done.out.count("shared by 2 processes") == 1 and not run.exists()
    done = launched(2, ["--help"])
    assert done.statuses() == {} and done.out.count("usage:") == 1 and "mlx.launch -n 2" in done.out


@pytest.mark.slow
def test_a_full_disk_at_the_first_rank_is_told_once(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    full = """
    import errno
    from mlx_linearard.distill import loop
    def append(path, value):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    loop.append_line = append
    """
    done = launched(
        2, flags(model_dir, text_file, tmp_path / "run", "--grad-accum", "2", "--steps", "3"), patched(full)
    )
    assert done.statuses() == {0: 2, 1: 2}, done.err
    assert len(done.errors()) == 1 and "no space left" in done.errors()[0]


@pytest.mark.slow
def test_a_bug_at_one_rank_keeps_its_traceback_and_ends_the_others(
    model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    bug = """
    import os
    from mlx_linearard.distill import step as trainer
    real = trainer.gradient_norm
    def norm(gradients):
        if os.environ["MLX_RANK"] == "1":
            raise ValueError("a bug")
        return real(gradients)
    trainer.gradient_norm = norm
    """
    run = tmp_path / "run"
    done = launched(2, flags(model_dir, text_file, run, "--grad-accum", "2", "--steps", "3"), patched(bug))
    assert done.statuses() == {0: LOST_STATUS, 1: 1}, done.err
    assert "ValueError: a bug" in done.err and done.err.count("error: another of the 2 processes has ended") == 1


@pytest.mark.slow
def test_mlx_launch_with_one_process_is_as_without(
    alone: Callable[..., Path], model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert launched(1, flags(model_dir, text_file, run, *PASSES)).statuses() == {}
    assert [m["loss"] for m in metrics(run)] == [m["loss"] for m in metrics(alone(*PASSES))]
