"""What to type after a run. The steps follow from the numbers of the verdict, so they agree with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..cli import path_word
from ..config import LEARNING_RATE, LONG_WEIGHT
from ..errors import UserError
from ..files import RunDir, read_config, read_yaml
from ..rope import family_or_default, normalise
from .info import RunInfo
from .long_window import LongWindow
from .moods import BAD, PARTLY, UNKNOWN
from .objectives import NOT_NEEDED
from .rows import NATIVE, RESTORED, SCALED
from .statistics import KL
from .suites import COPYING, KEPT, shortfalls
from .verdict import Measured, finished, long_of

DISTILL, EVALUATE = "mlx_linearard.distill", "mlx_linearard.evaluate"
MORE_SAMPLES = 32
Command = tuple[object, ...]


@dataclass(frozen=True)
class NextStep:
    """Something to do, and the command lines for it, each as the words of a shell command."""

    text: str
    commands: tuple[Command, ...]


def next_steps(measured: Measured, root: Path) -> Iterator[NextStep]:
    """The steps after a finished run or comparison in `root`: training more, another method, serving, measuring."""
    names = finished(measured)
    if not names:
        return
    best = measured.contest.best(KL) if measured.objectives else RESTORED
    run = RunDir(root / best if measured.objectives else root)
    info = measured.results.run or RunInfo()
    short = _falls_short(measured, best)
    if short:
        yield from _train_on(info, run, one=not measured.objectives)
    yield from _long(long_of(measured), info, run, path_word(root), short=short)
    model = path_word(run.model)
    yield NextStep(
        "Use the model, or serve it:",
        (("mlx_lm.generate", "--model", model, "--prompt", "Hello"), ("mlx_lm.server", "--model", model)),
    )
    if not all(any(suite in measured.row(name).suites for suite in COPYING) for name in (NATIVE, *names)):
        yield NextStep(
            "Measure whether it finds and copies details of a long text, which KL and perplexity do not show:",
            ((EVALUATE, "--run", path_word(root), "--suite", "passkey,ruler", "--data", "TEXT"),),
        )


def _long(long: LongWindow, info: RunInfo, run: RunDir, root: str, *, short: bool) -> Iterator[NextStep]:
    """What helps the use of the long window, or what shows whether it is used."""
    weight = 2 * info.long_weight if info.long_weight else LONG_WEIGHT
    if long.mood in (BAD, PARTLY) and not (short and info.method != "yarn"):  # another method comes first
        text = "Teach it to use the long window: train on long text" + (
            ", with more weight:" if info.long_weight else ":"
        )
        more = ("--long-weight", f"{weight:g}", "--output", _beside(run, "long"))
        yield NextStep(text, ((DISTILL, "--config", path_word(run.config), *more),))
    elif long.mood == UNKNOWN:
        words = [EVALUATE, "--run", root, "--suite", "far", "--data", path_word(info.valid_data or "TEXT")]
        of = "" if info.valid_data else " (TEXT: long documents that were not trained on)"
        title = f"Measure whether the long window is used{of}:"
        if long.measured:
            title, words = f"Measure the long window on more text{of}:", [*words, "--samples", str(MORE_SAMPLES)]
        yield NextStep(title, (tuple(words),))


def _falls_short(measured: Measured, name: str) -> bool:
    """Whether the verdict does not call the model restored, although scaling cost something."""
    scaled, own = measured.row(SCALED).kl, measured.row(name).kl
    if scaled is None or own is None:
        return False
    lost = any(one.certain and not one.beyond for one in shortfalls(measured.results, name, measured.window))
    return lost or (scaled >= NOT_NEEDED and 1 - own / scaled < KEPT)


def _train_on(info: RunInfo, run: RunDir, *, one: bool) -> Iterator[NextStep]:
    """More tokens, if the last state was the best; another scaling, if YaRN was not tried; another objective."""
    again = (DISTILL, "--config", path_word(run.config))
    if info.steps and (not one or info.exported_step == info.steps):
        yield NextStep("Train on more tokens:", ((*again, "--steps", 2 * info.steps, "--resume"),))
    elif info.exported_step is not None:
        yield NextStep(
            f"The last steps made it worse: step {info.exported_step} was the best. Train again with a lower learning "
            "rate:",
            ((*again, "--learning-rate", _lower_rate(run), "--output", _beside(run, "slower")),),
        )
    if info.method != "yarn" and _takes_yarn(info, run):
        yield NextStep(
            "Try YaRN, which loses less on most models:",
            ((*again, "--method", "yarn", "--output", _beside(run, "yarn")),),
        )
    elif info.objective == "relation":
        yield NextStep(
            "Try another objective:", ((*again, "--objective", "logits", "--output", _beside(run, "logits")),)
        )


def _lower_rate(run: RunDir) -> str:
    """A third of the run's learning rate."""
    try:
        config = read_yaml(run.config)
    except UserError:
        config = None
    own = config.get("learning_rate") if isinstance(config, dict) else None
    third = (own if isinstance(own, float) and 0 < own < 1 else LEARNING_RATE) / 3
    return f"{third:.1e}".replace(".0e", "e").replace("e-0", "e-")


def _takes_yarn(info: RunInfo, run: RunDir) -> bool:
    """Whether the run's model can be scaled by YaRN; true if its config is gone or damaged."""
    try:
        config = normalise(read_config(run.base))
    except (UserError, ValueError):
        return True
    scaled_before = info.method == "ntk" and config["rope_scaling"]  # which ntk keeps and YaRN would overwrite
    return "yarn" in family_or_default(config).methods and not scaled_before


def _beside(run: RunDir, word: str) -> str:
    """A directory next to the run."""
    return path_word(run.root.with_name(f"{run.root.name}-{word}"))
