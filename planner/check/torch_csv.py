"""Proof that a CSV for ``torch.distributed.pipelining`` runs, without torch.

torch's own validator counts actions and looks at one rank at a time; its simulator refuses every
schedule that torch lowers itself, and OVERLAP_F_B. :func:`check_rows` finds what they let through:
what torch's parser reads as something else (``0BW1`` as ``0B``), missing or doubled messages, pairs
of ranks that post messages in different orders, missing gradient reductions, forwards of the last
stage out of order, and rows that wait for each other. It stops at the first part that has findings,
as later parts rely on earlier ones.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_LEAF = re.compile(r"(0|[1-9][0-9]*)(F|I|W|B|SEND_F|RECV_F|SEND_B|RECV_B)(0|[1-9][0-9]*)")
_STAGE_WIDE = re.compile(r"(0|[1-9][0-9]*)(UNSHARD|RESHARD|REDUCE_GRAD)")
_PAIR = re.compile(r"\(([^()]*)\)OVERLAP_F_B")
_SHOWN_PER_RULE = 20
_NO_MICROBATCH = -1


class CsvFinding(NamedTuple):
    """A broken rule; ``rank`` and ``cell`` say where, -1 where it is none in particular."""

    rule: str
    message: str
    rank: int = -1
    cell: int = -1


class _Leaf(NamedTuple):
    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        shown = "" if self.microbatch == _NO_MICROBATCH else str(self.microbatch)
        return f"{self.stage}{self.kind}{shown}"


class _At(NamedTuple):
    leaf: _Leaf
    rank: int
    cell: int

    def fault(self, text: str) -> _Fault:
        return f"rank {self.rank}, cell {self.cell}: {self.leaf} {text}", self.rank, self.cell


_Fault = tuple[str, int, int]


@dataclass
class _Table:
    """A parsed file. ``half`` is the number of stages of one copy of the model."""

    rows: list[list[tuple[_Leaf, ...]]]
    directions: int
    wanted_microbatches: int | None

    def __post_init__(self) -> None:
        self.leaves = [
            _At(leaf, rank, index)
            for rank, row in enumerate(self.rows)
            for index, cell in enumerate(row)
            for leaf in cell
        ]
        self.compute = [at for at in self.leaves if at.leaf.kind in "FIWB"]
        self.with_comms = any(at.leaf.kind not in "FIWB" for at in self.leaves)
        self.rank_of: dict[int, int] = {}
        for at in self.compute:
            self.rank_of.setdefault(at.leaf.stage, at.rank)
        self.num_stages = max(self.rank_of, default=-1) + 1
        self.half = self.num_stages // self.directions
        numbers = {at.leaf.microbatch for at in self.compute}
        self.num_microbatches = self.wanted_microbatches or max(numbers, default=-1) + 1

    def is_first(self, stage: int) -> bool:
        return stage % self.half == 0

    def is_last(self, stage: int) -> bool:
        return stage % self.half == self.half - 1

    def source(self, leaf: _Leaf) -> _Leaf | None:
        """The compute that makes the input of an F, I or B, or of a receive."""
        stage, kind, microbatch = leaf
        if kind in ("F", "RECV_F"):
            return None if self.is_first(stage) else _Leaf(stage - 1, "F", microbatch)
        if self.is_last(stage):
            return _Leaf(stage, "F", microbatch)
        return _Leaf(stage + 1, "B", microbatch)

    def crosses(self, leaf: _Leaf) -> bool:
        """Whether the input of an F, I or B comes from another rank."""
        source = self.source(leaf)
        return source is not None and self.rank_of[source.stage] != self.rank_of[leaf.stage]


def check_rows(
    rows: Sequence[Sequence[str]], *, directions: int = 1, num_microbatches: int | None = None
) -> list[CsvFinding]:
    """Find what is wrong with a table; an empty list proves that it runs.

    A table with any communication in it is checked as compute_comms, else as compute_only.

    Args:
        rows: a row of cells per rank.
        directions: 2 for DualPipe's two copies of the model as a V of 2P stages, else 1.
        num_microbatches: n_microbatches of torch's schedule; None takes what the table shows.
    """
    parsed, findings = _parse(rows)
    if findings:
        return _shown(findings)
    table = _Table(parsed, directions, num_microbatches)
    for rule, faults in _RULES.items():
        findings = [CsvFinding(rule, *fault) for fault in faults(table)]
        if findings:
            return _shown(findings)
    return []


def _shown(findings: list[CsvFinding]) -> list[CsvFinding]:
    extra = len(findings) - _SHOWN_PER_RULE
    if extra <= 0:
        return findings
    more = CsvFinding(findings[0].rule, f"and {extra} more findings of this rule")
    return [*findings[:_SHOWN_PER_RULE], more]


# -- grammar ---------------------------------------------------------------------------------------


def _parse(
    rows: Sequence[Sequence[str]],
) -> tuple[list[list[tuple[_Leaf, ...]]], list[CsvFinding]]:
    findings: list[CsvFinding] = []
    parsed: list[list[tuple[_Leaf, ...]]] = []
    for rank, row in enumerate(rows):
        parsed.append([])
        for index, text in enumerate(row):
            try:
                parsed[-1].append(_parse_cell(text.strip()))
            except ValueError as error:
                message = f"rank {rank}, cell {index}: {error}"
                findings.append(CsvFinding("grammar", message, rank, index))
    return parsed, findings


def _parse_cell(text: str) -> tuple[_Leaf, ...]:
    if not text:
        return ()
    if pair := _PAIR.fullmatch(text):
        halves = tuple(_parse_leaf(half.strip()) for half in pair[1].split(";"))
        if [half.kind for half in halves] != ["F", "B"]:
            raise ValueError(f"{text!r} is not a pair of an F and a B")
        return halves
    return (_parse_leaf(text),)


def _parse_leaf(text: str) -> _Leaf:
    if match := _LEAF.fullmatch(text):
        return _Leaf(int(match[1]), match[2], int(match[3]))
    if match := _STAGE_WIDE.fullmatch(text):
        return _Leaf(int(match[1]), match[2], _NO_MICROBATCH)
    raise ValueError(f"{text!r} is no action such as 2F0, 1SEND_F3 or (0F3;3B1)OVERLAP_F_B")


# -- rules -----------------------------------------------------------------------------------------


def _row_faults(table: _Table) -> Iterator[_Fault]:
    if not table.rows:
        yield "the file is empty", -1, -1
    for rank, row in enumerate(table.rows):
        if not any(row):
            yield f"rank {rank} does nothing: torch counts every line as a rank", rank, -1
        for index, cell in enumerate(row):
            if not cell and table.with_comms:
                yield (
                    f"rank {rank}, cell {index} is empty, which is refused beside communication",
                    rank,
                    index,
                )


def _stage_faults(table: _Table) -> Iterator[_Fault]:
    for at in table.leaves:
        home = table.rank_of.get(at.leaf.stage)
        if home != at.rank:
            where = "no rank" if home is None else f"rank {home}"
            yield at.fault(f"is of a stage that {where} runs")
    if table.num_stages != len(table.rank_of):
        missing = next(i for i in range(table.num_stages) if i not in table.rank_of)
        yield f"no rank runs stage {missing} of {table.num_stages}", -1, -1
    if table.num_stages % table.directions:
        yield f"{table.num_stages} stages are not two copies of a model", -1, -1


def _count_faults(table: _Table) -> Iterator[_Fault]:
    counts = Counter(at.leaf for at in table.compute)
    for leaf, count in counts.items():
        if count > 1:
            yield f"{leaf} is there {count} times", table.rank_of[leaf.stage], -1
        elif leaf.microbatch >= table.num_microbatches:
            yield f"{leaf}: there are {table.num_microbatches} microbatches", -1, -1
    if table.num_stages * table.num_microbatches > len(counts):  # not counted up to any number
        yield f"fewer actions than {table.num_microbatches} microbatches need", -1, -1
        return
    for stage in range(table.num_stages):
        for microbatch in range(table.num_microbatches):
            chunk = {kind: counts[_Leaf(stage, kind, microbatch)] for kind in "FBIW"}
            backward = chunk["B"], chunk["I"], chunk["W"]
            if not chunk["F"]:
                yield f"{stage}F{microbatch} is missing", table.rank_of[stage], -1
            if backward not in ((1, 0, 0), (0, 1, 1)):
                found = " and ".join(kind for kind in "BIW" if chunk[kind]) or "none"
                yield (
                    f"stage {stage}, microbatch {microbatch}: its backward is {found}, not B or"
                    " I and W",
                    table.rank_of[stage],
                    -1,
                )


def _order_faults(table: _Table) -> Iterator[_Fault]:
    done: set[_Leaf] = set()
    newest: dict[int, int] = {}
    for at in table.compute:
        stage, kind, microbatch = at.leaf
        before = _Leaf(stage, "I" if kind == "W" else "F", microbatch)
        if kind != "F" and before not in done:
            yield at.fault(f"comes before {before}")
        if kind == "F" and table.is_last(stage):
            if microbatch < newest.get(stage, -1):
                yield at.fault(
                    f"comes after {stage}F{newest[stage]}: torch looks losses up by the order in "
                    "which the last stage makes them"
                )
            newest[stage] = microbatch
        done.add(at.leaf)


def _message_faults(table: _Table) -> Iterator[_Fault]:
    if not table.with_comms:
        return
    wanted = _wanted_messages(table)
    found = Counter(at.leaf for at in table.leaves if at.leaf.kind[:4] in ("SEND", "RECV"))
    for leaf in sorted(wanted - set(found)):
        yield f"{leaf} is missing", table.rank_of[leaf.stage], -1
    done: set[_Leaf] = set()
    for at in table.leaves:
        leaf = at.leaf
        if leaf.kind[:4] in ("SEND", "RECV"):
            if leaf not in wanted:
                yield at.fault("carries nothing from one rank to another")
            elif leaf in done:
                yield at.fault("is there twice")
            elif leaf.kind[:4] == "SEND" and not _makers(leaf) & done:
                yield at.fault("comes before what it sends")
        elif leaf.kind in "FIB" and table.crosses(leaf):
            letter = "F" if leaf.kind == "F" else "B"
            receive = _Leaf(leaf.stage, f"RECV_{letter}", leaf.microbatch)
            if receive in found and receive not in done:
                yield at.fault(f"comes before {receive}")
        done.add(leaf)


def _wanted_messages(table: _Table) -> set[_Leaf]:
    wanted: set[_Leaf] = set()
    for at in table.compute:
        if at.leaf.kind in "FIB" and table.crosses(at.leaf):
            stage, kind, microbatch = at.leaf
            letter, source = ("F", stage - 1) if kind == "F" else ("B", stage + 1)
            wanted.add(_Leaf(stage, f"RECV_{letter}", microbatch))
            wanted.add(_Leaf(source, f"SEND_{letter}", microbatch))
    return wanted


def _makers(send: _Leaf) -> set[_Leaf]:
    kinds = "F" if send.kind == "SEND_F" else "BI"
    return {_Leaf(send.stage, kind, send.microbatch) for kind in kinds}


def _pairing_faults(table: _Table) -> Iterator[_Fault]:
    """Messages of a pair of ranks have no tags: both ends must post them in one order."""
    posted: dict[tuple[int, int], list[tuple[_Leaf, _At]]] = {}
    for at in table.leaves:
        if at.leaf.kind[:4] not in ("SEND", "RECV"):
            continue
        step = 1 if at.leaf.kind in ("SEND_F", "RECV_B") else -1
        peer = table.rank_of[at.leaf.stage + step]
        stage = at.leaf.stage + (step if at.leaf.kind.startswith("RECV") else 0)
        carried = _Leaf(stage, at.leaf.kind[-1], at.leaf.microbatch)
        posted.setdefault((at.rank, peer), []).append((carried, at))
    for (rank, peer), ours in sorted(posted.items()):
        theirs = posted[peer, rank]
        for (what, at), (other, there) in zip(ours, theirs, strict=True):
            if rank < peer and what != other:
                yield at.fault(f"meets {there.leaf} of rank {peer}, cell {there.cell}")
                break


def _reduction_faults(table: _Table) -> Iterator[_Fault]:
    if not table.with_comms:
        return
    last = {at.leaf.stage: at.cell for at in table.compute if at.leaf.kind in "BW"}
    reductions = [at for at in table.leaves if at.leaf.kind == "REDUCE_GRAD"]
    counts = Counter(at.leaf.stage for at in reductions)
    for stage, rank in table.rank_of.items():
        if counts[stage] != 1:
            yield (
                f"stage {stage} has {counts[stage]} REDUCE_GRAD, not one: its gradients would not "
                "be scaled and reduced once",
                rank,
                -1,
            )
    for at in reductions:
        if at.cell < last[at.leaf.stage]:
            yield at.fault("comes before the stage's last backward")


def _shard_faults(table: _Table) -> Iterator[_Fault]:
    gathered: set[int] = set()
    if not any(at.leaf.kind == "UNSHARD" for at in table.leaves):
        return  # of no meaning but for FSDP, where torch then stops at the first compute
    for at in table.leaves:
        stage, kind, _ = at.leaf
        if kind == "UNSHARD" and stage in gathered:
            yield at.fault("gathers a stage that is gathered")
        elif kind in ("F", "I", "W", "B", "RESHARD") and stage not in gathered:
            yield at.fault("needs an UNSHARD before it")
        if kind == "UNSHARD":
            gathered.add(stage)
        elif kind == "RESHARD":
            gathered.discard(stage)


def _deadlocks(table: _Table) -> Iterator[_Fault]:
    """Plays the rows: a compute action waits for its input, and nothing else blocks the host."""
    done: set[_Leaf] = set()
    position = [0] * len(table.rows)
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(table.rows):
            while position[rank] < len(row) and _ready(table, row[position[rank]], done):
                done |= {_hands_on(leaf) for leaf in row[position[rank]]}
                position[rank] += 1
                moved = True
    for rank, (row, k) in enumerate(zip(table.rows, position, strict=True)):
        if k < len(row):
            cell = ";".join(map(str, row[k]))
            yield f"rank {rank}, cell {k}: {cell} waits for ever", rank, k


def _ready(table: _Table, cell: tuple[_Leaf, ...], done: set[_Leaf]) -> bool:
    for leaf in cell:
        if leaf.kind not in "FIB":
            continue
        source = table.source(leaf)
        if source is None:
            continue
        needed = source
        if table.with_comms and table.crosses(leaf):
            needed = _Leaf(source.stage, f"SEND_{source.kind}", source.microbatch)
        if needed not in done:
            return False
    return True


def _hands_on(leaf: _Leaf) -> _Leaf:
    """An I hands on what a B does."""
    return leaf._replace(kind="B") if leaf.kind == "I" else leaf


_RULES: dict[str, Callable[[_Table], Iterator[_Fault]]] = {
    "rows": _row_faults,
    "stages": _stage_faults,
    "counts": _count_faults,
    "order": _order_faults,
    "messages": _message_faults,
    "pairing": _pairing_faults,
    "reduction": _reduction_faults,
    "sharding": _shard_faults,
    "deadlock": _deadlocks,
}
