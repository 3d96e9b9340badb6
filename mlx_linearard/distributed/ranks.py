"""The processes that share a run's batches, and what they tell each other. A run of one process pays nothing.

`mlx.launch` starts the same command several times; each process is a rank of one group. A step's blocks are
divided among them, their gradients and losses become the mean over all, and so every rank makes the same
update of the same state. What is decided from the outside, by a file, a clock or an evaluation, the first rank
decides for all. Collectives are few and large, and each is an evaluation of its own, behind the computation
that its inputs come from.
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

# Where launchers say which rank a process is: mlx.launch, Open MPI, MPICH and its kin.
RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
BUFFER_BYTES = 32 << 20  # of arrays that travel together
ROOM = 1024  # bytes of a message that travels at once


@dataclass(frozen=True)
class Share:
    """A rank's part of a step: its group's passes of all, and of each batch its part of the rows."""

    group: int = 0
    groups: int = 1
    part: int = 0
    parts: int = 1

    def passes(self, grad_accum: int) -> range:
        """Which of a step's forward passes this rank makes."""
        each = grad_accum // self.groups
        return range(self.group * each, (self.group + 1) * each)

    def rows(self, batch_size: int) -> slice:
        """Which rows of a batch this rank reads."""
        each = batch_size // self.parts
        return slice(self.part * each, (self.part + 1) * each)


WHOLE = Share()


@dataclass(frozen=True)
class Ranks:
    """A process among those of its run; by default the only one. `hosts` names the machine of each rank."""

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
    def beside(self) -> int:
        """How many ranks there are on this rank's machine."""
        return self.hosts.count(self.hosts[self.rank])

    @property
    def devices(self) -> int:
        """Devices that compute: ranks on one machine have one between them, except that CUDA's have one each."""
        return self.size if mx.cuda.is_available() else len(set(self.hosts))

    def share(self, grad_accum: int, batch_size: int) -> Share:
        """This rank's part of a step, by whole passes as far as they go round; UserError where blocks do not.

        Every rank's part is equally large, so that the mean over a step is the mean of the ranks' means.
        """
        groups = math.gcd(grad_accum, self.size)
        parts = self.size // groups
        if batch_size % parts:
            step = self.size // math.gcd(self.size, batch_size)
            blocks, fits = grad_accum * batch_size, -(-grad_accum // step) * step
            raise UserError(
                f"{self.size} processes cannot share the {blocks} blocks of a step evenly (--grad-accum {grad_accum} "
                f"times --batch-size {batch_size}): give --grad-accum {fits}, or start {_fitting(blocks, self.size)}"
            )
        return Share(self.rank // parts, groups, self.rank % parts, parts)

    # -----------------------------------------------------------------------------------------------
    # Arrays

    def mean(self, tree: Any) -> Any:
        """The mean over the ranks of a tree of arrays that all have; the same bits at every rank."""
        if self.size == 1:
            return tree
        mx.eval(tree)
        return tree_map(lambda array: array / self.size, self._sum(tree))

    def of_first(self, tree: Any) -> Any:
        """The first rank's arrays, at every rank, in a tree that is alike at all."""
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
            joint = self._together(mx.distributed.all_sum(joint, group=self.group))
            start = 0
            for i in places:
                summed[i] = joint[start : start + arrays[i].size].reshape(arrays[i].shape)
                start += arrays[i].size
        mx.eval(list(summed.values()))
        order = iter(range(len(arrays)))
        return tree_map(lambda _: summed[next(order)], tree)

    def _together(self, collective: mx.array) -> mx.array:
        """Evaluate a collective; LostProcess where another rank is no longer there."""
        try:
            mx.eval(collective)
        except RuntimeError as error:
            raise LostProcess(f"another of the {self.size} processes has ended") from error
        return collective

    # -----------------------------------------------------------------------------------------------
    # Words

    def from_first(self, body: Callable[[], T]) -> T:
        """The value (of JSON) that `body` has at the first rank, at every rank; the others do not run it.

        A UserError of it ends all ranks, and the first one tells it. Whatever else it raises ends this rank.
        """
        if self.size == 1:
            return body()
        return self._exchange(body if self.leads else lambda: None)[0]

    def each(self, body: Callable[[], T]) -> T:
        """`body` at every rank, with its own value; a UserError of any ends all, and is told once."""
        if self.size == 1:
            return body()
        values: list[T] = []
        self._exchange(lambda: values.append(body()))
        return values[0]

    def in_turn(self, body: Callable[[], T]) -> T:
        """As `each`, but at the first rank before the others: what it has fetched they find."""
        if self.leads:
            value = self.each(body)
            self.each(lambda: None)
            return value
        self.each(lambda: None)
        return self.each(body)

    def gathered(self, body: Callable[[], T]) -> list[T]:
        """The values (of JSON) that `body` has at each rank, at every rank, in their order."""
        return [body()] if self.size == 1 else self._exchange(body)

    def _exchange(self, body: Callable[[], Any]) -> list[Any]:
        """Each rank's value. Where any has a UserError, the first that has raises it, and the others end quietly."""
        own: BaseException | None = None
        try:
            mine = {"value": body()}
        except UserError as error:
            own, mine = error, {"status": USER_ERROR_STATUS}
        except SystemExit as error:  # --help
            own, mine = error, {"status": error.code}
        found = [json.loads(text) for text in self._gather(json.dumps(mine))]
        for rank, one in enumerate(found):
            if "status" in one:
                raise own if own is not None and rank == self.rank else SystemExit(one["status"])
        return [one["value"] for one in found]

    def _gather(self, text: str) -> list[str]:
        """The texts of all ranks. Short ones travel at once, others behind their lengths."""
        data = text.encode()
        lengths, rows = self._gather_bytes(data, ROOM)
        if max(lengths) > ROOM:
            lengths, rows = self._gather_bytes(data, max(lengths))
        return [row[:length].decode() for length, row in zip(lengths, rows, strict=True)]

    def _gather_bytes(self, data: bytes, room: int) -> tuple[list[int], list[bytes]]:
        """The ranks' lengths and the first `room` bytes of each."""
        message = len(data).to_bytes(8, "big") + data[:room].ljust(room, b"\0")
        gathered = mx.distributed.all_gather(mx.array(np.frombuffer(message, np.uint8))[None], group=self.group)
        rows = [row.tobytes() for row in np.array(self._together(gathered))]
        return [int.from_bytes(row[:8], "big") for row in rows], [row[8:] for row in rows]

    # -----------------------------------------------------------------------------------------------
    # The end

    @contextlib.contextmanager
    def on_loss(self, advice: Callable[[], str], save: Callable[[], object] = lambda: None) -> Iterator[None]:
        """While the block runs, where a rank is lost, `save` saves what can be, and `advice` says how to go on.

        Both are called from another thread, while this one may be anywhere in the block.
        """
        if self.watch is None:
            yield
            return
        with self.watch.rescuing(Rescue(advice, save)):
            yield


ALONE = Ranks()


def _fitting(blocks: int, most: int) -> str:
    """The largest number of processes, at most `most`, that share `blocks` evenly."""
    number = max(n for n in range(1, most + 1) if blocks % n == 0)
    return f"{number} processes" if number > 1 else "one process"


def _buffers(arrays: list[mx.array]) -> Iterator[list[int]]:
    """Places of arrays that travel together: of one dtype, in order, some BUFFER_BYTES each."""
    by_dtype: dict[mx.Dtype, list[int]] = {}
    for i, array in enumerate(arrays):
        by_dtype.setdefault(array.dtype, []).append(i)
    for places in by_dtype.values():
        chosen, held = list[int](), 0
        for i in places:
            chosen.append(i)
            held += arrays[i].nbytes
            if held >= BUFFER_BYTES:
                yield chosen
                chosen, held = [], 0
        if chosen:
            yield chosen


# ---------------------------------------------------------------------------------------------------
# Coming and going


def _rank_of_launcher() -> int | None:
    """The rank that a launcher has given to this process; None where none has started it, or only this one."""
    hosts = Path(os.environ.get("MLX_HOSTFILE") or os.devnull)
    if "MLX_HOSTFILE" in os.environ and hosts.exists() and not hosts.read_text(encoding="utf-8").strip():
        return None  # of mlx.launch -n 1, which mlx itself cannot read
    found = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), None)
    return int(found) if found is not None and found.isdigit() else None


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The group that a launcher has started this process in; ALONE where none has. Leaves it when the block ends.

    In the block only the first rank's standard output is heard, and SIGTERM, which mlx.launch sends where a rank
    has ended, ends this one in less than half a minute. Out of it come the block's exceptions; but those that
    another rank tells of become SystemExit with the same status, and LostProcess says how to go on.
    """
    launched = _rank_of_launcher()
    group = None if launched is None else _connect(launched)
    if group is None or group.size() == 1:
        yield ALONE
        return
    with contextlib.ExitStack() as stack:
        if group.rank():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        watch = stack.enter_context(Watch())
        try:
            ranks = _introduced(Ranks(group.rank(), group.size(), ("",) * group.size(), group), watch)
            yield ranks
        except LostProcess as lost:
            watch.leave()
            hang_up()
            if not watch.witness.tells():
                raise SystemExit(LOST_STATUS) from None
            raise LostProcess(f"{lost}; {lost.advice or watch.rescued()}") from None
        except KeyboardInterrupt:
            watch.leave()
            watch.witness.tell()
            if group.rank():
                raise SystemExit(INTERRUPTED_STATUS) from None
            raise
        except UserError:
            watch.leave()
            watch.witness.tell()
            raise
        except BaseException:
            watch.leave()
            raise


def _connect(launched: int) -> Any:
    """The group; UserError where it cannot be made."""
    try:
        group = mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {launched} cannot join the others: {one_line(error)}; where another run has these ports, give "
            "mlx.launch another --starting-port"
        ) from None
    if launched > 0 and group.size() == 1:
        raise UserError(
            f"process {launched} was started to share a run, but mx.distributed finds no others: "
            "start it with mlx.launch, or for MPI see that its library is found"
        )
    return group


def _introduced(ranks: Ranks, watch: Watch) -> Ranks:
    """The ranks with their machines known, and a witness for those of this one."""
    hosts = tuple(ranks.gathered(socket.gethostname))
    ranks = dataclasses.replace(ranks, hosts=hosts, watch=watch)
    keeper = hosts.index(hosts[ranks.rank])
    watch.witness = Witness.made() if keeper == ranks.rank else Witness()
    paths = ranks.gathered(lambda: watch.witness.path)
    if keeper != ranks.rank:
        watch.witness = Witness.opened(paths[keeper])
    ranks.gathered(lambda: None)  # all have it open
    watch.witness.hide()
    return ranks
