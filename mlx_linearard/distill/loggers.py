"""--report-to: the numbers of a run in a CSV file, in TensorBoard, or in a tracking service.

`Reporting` is a listener that passes every event on and gives its numbers to loggers. To add a logger, add a class
with `log` and `close` to LOGGERS, and its package to PACKAGES. Names are `train/loss`, `scaled/kl`, `restored/kl`,
`evaluation/kl`, `evaluation/perplexity@2048`.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..cli import path_word, shell_command
from ..config import DistillConfig
from ..errors import UserError, one_line
from ..files import RunDir, disk_errors, write_text
from ..results.rows import Row
from .listener import Listener
from .step import StepRecord

# The package that a logger needs; each is an extra of the logger's name.
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "swanlab": "swanlab", "trackio": "trackio"}

Values = Mapping[str, float]


class Logger(Protocol):
    """Where numbers go. `shown` says in one line where they can be seen."""

    shown: str

    def log(self, values: Values, step: int) -> None:
        """Finite numbers by name, after `step` steps."""

    def close(self) -> None:
        """Write what is still held."""


@dataclass(frozen=True)
class Place:
    """What a logger knows of its run. identity: the same for a run and what resumes it. step: steps already done."""

    folder: Path
    project: str
    name: str
    identity: str
    config: Mapping[str, Any]
    step: int


# ---------------------------------------------------------------------------------------------------
# Loggers


class Csv:
    """logs/metrics.csv: a line for each step and measurement, a column for each number."""

    def __init__(self, place: Place) -> None:
        self.path = place.folder / "metrics.csv"
        self.shown = str(self.path)
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            with self.path.open(encoding="utf-8", newline="") as file:
                kept = (row for row in csv.DictReader(file) if (row.get("step") or "").isascii())
                self.rows = [row for row in kept if row["step"].isdigit() and int(row["step"]) <= place.step]
        self.columns = list(dict.fromkeys(["step", *(name for row in self.rows for name in row if name)]))
        self._write_all()

    def log(self, values: Values, step: int) -> None:
        row = {"step": step, **values}
        self.rows.append(row)
        if new := [name for name in row if name not in self.columns]:
            self.columns += new
            self._write_all()
        else:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    def close(self) -> None:
        pass

    def _write_all(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())


class TensorBoard:
    """logs/: event files, written by TensorBoard's own package, which the reader needs as well."""

    def __init__(self, place: Place) -> None:
        writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self.events = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self.summaries = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        self.shown = shell_command("tensorboard", "--logdir", path_word(place.folder))
        self.writer = writer.EventFileWriter(str(place.folder))
        if place.step:  # readers drop what an earlier event file has from this step on
            start = self.events.SessionLog(status=self.events.SessionLog.START)
            self.writer.add_event(self.events.Event(wall_time=time.time(), step=place.step + 1, session_log=start))

    def log(self, values: Values, step: int) -> None:
        entries = [self.summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        summary = self.summaries.Summary(value=entries)
        self.writer.add_event(self.events.Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases; WANDB_MODE=offline writes below logs/ only."""

    def __init__(self, place: Place) -> None:
        wandb = importlib.import_module("wandb")
        self.run = wandb.init(
            project=place.project,
            name=place.name,
            id=place.identity,
            resume="allow",
            dir=str(place.folder),
            config=dict(place.config),
            settings=wandb.Settings(silent=True),
        )
        offline = f"{place.folder}/wandb (offline; wandb sync sends it)"
        self.shown = offline if self.run.offline else self.run.url

    def log(self, values: Values, step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class SwanLab:
    """SwanLab; SWANLAB_MODE=offline writes below logs/ only."""

    def __init__(self, place: Place) -> None:
        swanlab = importlib.import_module("swanlab")
        self.run = swanlab.init(
            project=place.project,
            name=place.name,
            id=place.identity,
            resume="allow",
            log_dir=str(place.folder / "swanlog"),
            config=dict(place.config),
        )
        self.shown = f"project {place.project}, and {place.folder}/swanlog"

    def log(self, values: Values, step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """trackio: a local database (TRACKIO_DIR), or a Space that its own variables name."""

    def __init__(self, place: Place) -> None:
        self.trackio = importlib.import_module("trackio")
        self.run = self.trackio.init(
            project=place.project,
            name=f"{place.name}-{place.identity}",
            resume="allow",
            config=dict(place.config),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.shown = shell_command("trackio", "show", "--project", place.project)

    def log(self, values: Values, step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.trackio.finish()


LOGGERS: dict[str, Callable[[Place], Logger]] = {
    "csv": Csv,
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "swanlab": SwanLab,
    "trackio": Trackio,
}


def check_loggers(config: DistillConfig) -> None:
    """UserError if a logger of --report-to lacks its package."""
    for name in names_of(config):
        try:
            if name in PACKAGES:
                with contextlib.redirect_stdout(io.StringIO()):
                    importlib.import_module(PACKAGES[name])
        except ImportError as error:
            raise UserError(
                f"--report-to {name} needs the package {PACKAGES[name]} ({one_line(error)}): pip install "
                f"{PACKAGES[name]}"
            ) from None


def names_of(config: DistillConfig) -> list[str]:
    """The loggers of --report-to."""
    return config.report_to.split(",") if config.report_to else []


# ---------------------------------------------------------------------------------------------------
# The listener


@contextlib.contextmanager
def reporting(config: DistillConfig, listener: Listener) -> Iterator[Listener]:
    """`listener`, which also reports to the loggers of --report-to while the block runs."""
    if not (names := names_of(config)):
        yield listener
        return
    report = Reporting(listener, names, config.project_name)
    try:
        yield report
    finally:
        report.close()


class Reporting(Listener):
    """Passes events on to `inner`, and their numbers to loggers. A logger that fails is left out from then on."""

    def __init__(self, inner: Listener, names: list[str], project: str | None) -> None:
        self.inner, self.names, self.project = inner, names, project
        self.loggers: dict[str, Logger] = {}

    def started(self, run: RunDir, config: Mapping[str, Any], step: int) -> None:
        self.inner.started(run, config, step)
        name = run.root.absolute().name
        place = Place(run.logs, self.project or name, name, _identity(run), config, step)
        for logger in self.names:
            with disk_errors(run.logs):
                try:
                    with contextlib.redirect_stdout(io.StringIO()):
                        self.loggers[logger] = LOGGERS[logger](place)
                except (OSError, UserError, KeyboardInterrupt):
                    raise
                except Exception as error:  # services have errors of their own: no account, no network
                    raise UserError(
                        f"--report-to {logger} cannot start: {one_line(error)}; leave it out, or use its offline mode"
                    ) from None
            self.inner.say(f"reporting to {logger}: {self.loggers[logger].shown}")

    def say(self, text: str) -> None:
        self.inner.say(text)

    def progress(self, label: str, done: int, total: int, note: str = "") -> None:
        self.inner.progress(label, done, total, note)

    def stopping(self, step: int) -> None:
        self.inner.stopping(step)

    def step(self, record: StepRecord, total: int) -> None:
        self.inner.step(record, total)
        self._log({f"train/{name}": value for name, value in record.as_json().items() if name != "step"}, record.step)

    def measured(self, name: str, step: int, row: Row) -> None:
        self.inner.measured(name, step, row)
        perplexity = {f"perplexity@{length}": value for length, value in row.perplexity.items()}
        values = {"kl": row.kl, "agreement": row.agreement, **perplexity}
        self._log({f"{name}/{key}": value for key, value in values.items()}, step)

    def close(self) -> None:
        for name in list(self.loggers):
            self._try(name, lambda logger: logger.close())
        self.loggers.clear()

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        finite = {k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        for name in list(self.loggers):
            self._try(name, lambda logger: logger.log(finite, step))

    def _try(self, name: str, call: Callable[[Logger], None]) -> None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                call(self.loggers[name])
        except Exception as error:  # the run is worth more than its curves
            del self.loggers[name]
            self.inner.say(f"nothing more is reported to {name}: {one_line(error)}")


def _identity(run: RunDir) -> str:
    """A random name that a run keeps when it is resumed."""
    file = run.logs / "id"
    if not file.exists():
        write_text(file, uuid.uuid4().hex[:8])
    return file.read_text(encoding="utf-8")[:8]
