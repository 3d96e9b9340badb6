"""The processes that share a run, and the messages that they exchange. A run of one process exchanges nothing.

`mlx.launch` starts the same command several times; each process is a rank of one group. The ranks divide the
blocks of a step and average their gradients and losses, so every rank makes the same update of the same state.
The first rank reads clocks, writes files and evaluates, and it sends its decisions to the others. Collectives are
few and large. Each one is evaluated separately, after the computation of its inputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from ..errors import INTERRUPTED_STATUS, LOST_STATUS, USER_ERROR_STATUS, LostProcess, UserError, one_line
from ..models.trees import named_arrays
from .watchdog import Rescue, Watch, Witness, hang_up

T = TypeVar("T")

# The variables in which launchers give a process its rank: mlx.launch, Open MPI, MPICH and its relatives.
RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
BUFFER_BYTES = 32 << 20  # bytes of arrays that are sent together
MESSAGE_BYTES = 1024  # a longer message needs a second exchange


@dataclass(frozen=True)
class Share:
    """A rank's part of a step: its group's share of the forward passes, and its part of the rows of each batch."""

    group: int = 0
    groups: int = 1
    part: int = 0
    parts: int = 1

    def passes(self, grad_accum: int) -> range:
        """The forward passes of a step that this rank makes."""
        each = grad_accum // self.groups
        return range(self.group * each, (self.group + 1) * each)

    def rows(self, batch_size: int) -> slice:
        """The rows of a batch that this rank reads."""
        each = batch_size // self.parts
        return slice(self.part * each, (self.part + 1) * each)


WHOLE = Share()


class EndedByAnother(SystemExit):
    """Another rank ended the run, for a reason that it prints; the code is its exit status."""


@dataclass(frozen=True)
class Ranks:
    """One process of the group that shares a run; by default the only one. `hosts` names the machine of each rank."""

    rank: int = 0
    size: int = 1
    hosts: tuple[str, ...] = ("",)
    group: Any = None
    watch: Watch | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the first rank: the one that writes, prints and decides."""
        return self.rank == 0

    @property
    def on_this_host(self) -> int:
        """The number of ranks on this rank's machine."""
        return self.hosts.count(self.hosts[self.rank])

    @property
    def devices(self) -> int:
        """The number of devices that compute: one per rank with CUDA, else one per machine."""
        return self.size if mx.cuda.is_available() else len(set(self.hosts))

    def share(self, grad_accum: int, batch_size: int) -> Share:
        """This rank's part of a step: complete forward passes if they divide evenly, else also some rows of batches.

        All parts are equal in size, so the mean over a step is the mean of the ranks' means.

        Raises:
            UserError: the blocks of a step cannot be divided evenly; the message names numbers that work.
        """
        groups = math.gcd(grad_accum, self.size)
        parts = self.size // groups
        if batch_size % parts:
            multiple = self.size // math.gcd(self.size, batch_size)
            blocks, nearest = grad_accum * batch_size, -(-grad_accum // multiple) * multiple
            raise UserError(
                f"{self.size} processes cannot share the {blocks} blocks of a step evenly (--grad-accum {grad_accum} "
                f"times --batch-size {batch_size}): give --grad-accum {nearest}, or start "
                f"{_processes_for(blocks, self.size)}"
            )
        return Share(self.rank // parts, groups, self.rank % parts, parts)

    # -----------------------------------------------------------------------------------------------
    # Arrays

    def mean(self, tree: Any) -> Any:
        """The mean over the ranks of a tree of arrays of equal shapes; the same bits at every rank."""
        if self.size == 1:
            return tree
        mx.eval(tree)
        return tree_map(lambda array: array / self.size, self._sum(tree))

    def arrays_from_first(self, tree: Any) -> Any:
        """The first rank's arrays, at every rank; the trees of all ranks have the same shapes."""
        if self.size == 1:
            return tree
        return self._sum(tree if self.leads else tree_map(mx.zeros_like, tree))

    def _sum(self, tree: Any) -> Any:
        """The sum over the ranks, evaluated. Arrays of one dtype travel together (keys of the tree may hold dots)."""
        arrays = [array for _, array in named_arrays(tree)]
        summed: dict[int, mx.array] = {}
        for places in _buffers(arrays):
            joint = mx.concatenate([arrays[i].reshape(-1) for i in places])
            mx.eval(joint)
            joint = self._evaluate(mx.distributed.all_sum(joint, group=self.group))
            start = 0
            for i in places:
                summed[i] = joint[start : start + arrays[i].size].reshape(arrays[i].shape)
                start += arrays[i].size
        mx.eval(list(summed.values()))
        order = iter(range(len(arrays)))
        return tree_map(lambda _: summed[next(order)], tree)

    def _evaluate(self, collective: mx.array) -> mx.array:
        """Evaluate a collective; LostProcess if another rank has ended."""
        try:
            mx.eval(collective)
        except RuntimeError as error:
            raise LostProcess(f"another of the {self.size} processes has ended") from error
        return collective

    # -----------------------------------------------------------------------------------------------
    # Messages

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """A part of the run that all ranks begin and end together, or not at all.

        A UserError (or SystemExit, as of --help) of one rank ends the block at every rank: the rank itself raises
        its error, the others raise EndedByAnother with the same status. Inside the block, the other ranks notice
        the error at their next exchange, so all ranks must make the same exchanges in the same order. Meetings do
        not nest.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except EndedByAnother:
            raise
        except (UserError, SystemExit) as error:
            self._exchange(None, error)
        else:
            self._exchange(None)

    def from_first(self, value: T) -> T:
        """The first rank's `value` (JSON), at every rank; the values of the others are ignored."""
        return value if self.size == 1 else self._exchange(value if self.leads else None)[0]

    def gather(self, value: T) -> list[T]:
        """The values (JSON) of all ranks, in their order, at every rank."""
        return [value] if self.size == 1 else self._exchange(value)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set at any rank; the same answer at every rank."""
        return any(self.gather(flag))

    def wait(self) -> None:
        """Return when all ranks have come to this call."""
        self.gather(None)

    def _exchange(self, value: Any, error: UserError | SystemExit | None = None) -> list[Any]:
        """Send a value or an error, and receive those of all ranks.

        Raises:
            UserError, SystemExit: `error`, if this is the first rank that has one.
            EndedByAnother: an earlier rank has an error, or a later rank has one and this rank has none.
        """
        mine = {"value": value} if error is None else {"status": _status(error)}
        messages = [json.loads(text) for text in self._gather_texts(json.dumps(mine))]
        for rank, message in enumerate(messages):
            if "status" in message:
                raise error if error is not None and rank == self.rank else EndedByAnother(message["status"])
        return [message["value"] for message in messages]

    def _gather_texts(self, text: str) -> list[str]:
        """The texts of all ranks. Short texts need one exchange, longer ones two."""
        data = text.encode()
        lengths, rows = self._gather_bytes(data, MESSAGE_BYTES)
        if max(lengths) > MESSAGE_BYTES:
            lengths, rows = self._gather_bytes(data, max(lengths))
        return [row[:length].decode() for length, row in zip(lengths, rows, strict=True)]

    def _gather_bytes(self, data: bytes, room: int) -> tuple[list[int], list[bytes]]:
        """The lengths of all ranks' data, and the first `room` bytes of each."""
        message = len(data).to_bytes(8, "big") + data[:room].ljust(room, b"\0")
        gathered = mx.distributed.all_gather(mx.array(np.frombuffer(message, np.uint8))[None], group=self.group)
        rows = [row.tobytes() for row in np.array(self._evaluate(gathered))]
        return [int.from_bytes(row[:8], "big") for row in rows], [row[8:] for row in rows]

    # -----------------------------------------------------------------------------------------------
    # The loss of a rank

    @contextlib.contextmanager
    def on_loss(self, advice: Callable[[], str], save: Callable[[], object] = lambda: None) -> Iterator[None]:
        """While the block runs: if a rank is lost, `save` saves the run, and `advice` says how to continue it.

        Another thread calls both functions, while this thread may be at any place in the block.
        """
        if self.watch is None:
            yield
            return
        with self.watch.rescuing(Rescue(advice, save)):
            yield


ALONE = Ranks()


def _status(error: UserError | SystemExit) -> Any:
    return USER_ERROR_STATUS if isinstance(error, UserError) else error.code


def _processes_for(blocks: int, most: int) -> str:
    """The largest number of processes, at most `most`, that can share `blocks` evenly, in words."""
    number = max(n for n in range(1, most + 1) if blocks % n == 0)
    return f"{number} processes" if number > 1 else "one process"


def _buffers(arrays: list[mx.array]) -> Iterator[list[int]]:
    """Places of arrays that travel together: of one dtype, in order, about BUFFER_BYTES per buffer."""
    by_dtype: dict[mx.Dtype, list[int]] = {}
    for i, array in enumerate(arrays):
        by_dtype.setdefault(array.dtype, []).append(i)
    for places in by_dtype.values():
        chosen, size = list[int](), 0
        for i in places:
            chosen.append(i)
            size += arrays[i].nbytes
            if size >= BUFFER_BYTES:
                yield chosen
                chosen, size = [], 0
        if chosen:
            yield chosen


# ---------------------------------------------------------------------------------------------------
# Joining and leaving the group


def _launched_rank() -> int | None:
    """The rank that a launcher gave to this process; None without a launcher, or if it started one process only."""
    hosts = Path(os.environ.get("MLX_HOSTFILE") or os.devnull)
    if "MLX_HOSTFILE" in os.environ and hosts.exists() and not hosts.read_text(encoding="utf-8").strip():
        return None  # mlx.launch -n 1 writes an empty host file, which mlx itself cannot read
    rank = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), None)
    return int(rank) if rank is not None and rank.isascii() and rank.isdigit() else None


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The group of processes that a launcher started, or ALONE; this process leaves the group when the block ends.

    Inside the block only the first rank's standard output is printed. SIGTERM, which mlx.launch sends when a rank
    has ended, ends this process in less than half a minute. The block's exceptions pass through, except that an
    error which another rank prints becomes SystemExit with the same status. LostProcess says how to continue.
    """
    launched = _launched_rank()
    group = None if launched is None else _connect(launched)
    if group is None or group.size() == 1:
        yield ALONE
        return
    with contextlib.ExitStack() as stack:
        if group.rank():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        watch = stack.enter_context(Watch())
        try:
            yield _with_hosts(Ranks(group.rank(), group.size(), ("",) * group.size(), group), watch)
        except LostProcess as lost:
            watch.leave()
            hang_up()
            if not watch.witness.claim_report():
                raise SystemExit(LOST_STATUS) from None
            raise LostProcess(f"{lost}; {lost.advice or watch.rescue()}") from None
        except KeyboardInterrupt:
            watch.leave()
            watch.witness.mark_reported()
            if group.rank():
                raise SystemExit(INTERRUPTED_STATUS) from None
            raise
        except UserError:
            watch.leave()
            watch.witness.mark_reported()
            raise
        except BaseException:
            watch.leave()
            raise


def _connect(launched: int) -> Any:
    """The group; UserError if it cannot be joined."""
    try:
        group = mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {launched} cannot join the others: {one_line(error)}; if another run uses these ports, give "
            "mlx.launch another --starting-port"
        ) from None
    if launched > 0 and group.size() == 1:
        raise UserError(
            f"process {launched} was started to share a run, but mx.distributed finds no other process: "
            "start it with mlx.launch, or for MPI make sure that mlx finds the MPI library"
        )
    return group


def _with_hosts(ranks: Ranks, watch: Watch) -> Ranks:
    """The ranks with their machines known, and one witness file per machine."""
    hosts = tuple(ranks.gather(socket.gethostname()))
    ranks = dataclasses.replace(ranks, hosts=hosts, watch=watch)
    owner = hosts.index(hosts[ranks.rank])
    watch.witness = Witness.create() if owner == ranks.rank else Witness()
    paths = ranks.gather(watch.witness.path)
    if owner != ranks.rank:
        watch.witness = Witness.open(paths[owner])
    ranks.wait()  # until all have it open
    watch.witness.hide()
    return ranks
