"""``mhcplan profile overlap``: what an op and traffic do to each other while they overlap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from cyclopts import Parameter

from mhcplan.planner.cli.terminal import output
from mhcplan.planner.plan.spec import SpecError
from mhcplan.profiles import store
from mhcplan.profiles.overlap import OverlapModel, parse_traffic
from mhcplan.profiles.vocabulary import OpKey, TransferKey, parse_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mhcplan.profiles.overlap import Overlap
    from mhcplan.sim.program import Program

_Key = TypeVar("_Key", OpKey, TransferKey)
Words = Annotated[str, Parameter(allow_leading_hyphen=False)]


def overlap(
    compute: Words,
    traffic: Words,
    /,
    *,
    ctas: int | None = None,
    priority: Literal["equal", "high"] = "equal",
    profile: str = "h100-sxm",
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Price any op beside any traffic, both streams kept full: how much each slows the other.

    Args:
        compute: an op key ('mhc_post.F hidden=2560 n=4 tokens=4096'), an op of a model or plan
            (mhc-27b:attention.I), or a kernel that was overlapped (gemm_persistent)
        traffic: a pattern and a size ('send_recv 64MiB', 'all_to_all 8/4 8MiB' for 8 ranks, 4 of
            them on a node), or a transfer of a model or plan (mhc-27b:dispatch)
        ctas: SMs that the traffic takes; else as many as the library does
        priority: of the traffic's stream, against the op's
        profile: a shipped profile's name, or a profile file (.json)
        json: print one JSON object instead of text
    """
    model = OverlapModel(store.find_profile(profile), store.contention_log(profile))
    try:
        op, transfer = _compute(compute, model), _traffic(traffic)
        found = model.price(op, transfer, ctas=ctas, high_priority=priority == "high")
    except ValueError as error:  # of a price: also one line
        raise SpecError(str(error)) from None
    if json:
        from dataclasses import asdict
        from json import dumps

        print(dumps(asdict(found), indent=2))
    else:
        _print(found)


# -- what was asked for ----------------------------------------------------------------------------


def _compute(text: str, model: OverlapModel) -> OpKey | str:
    if text in model.kernels:
        return text
    if ":" in text:
        return _of_plan(text, _ops_called)
    if "." not in text:
        names = ", ".join(model.kernels) or "none"
        raise SpecError(
            f"compute={text!r} must be an op key (KIND.PASS AXIS=SIZE ...), MODEL:KIND.PASS, or a"
            f" kernel that was overlapped ({names})"
        )
    key = parse_key(text)
    assert isinstance(key, OpKey)  # only transfers have no dot
    return key


def _traffic(text: str) -> TransferKey:
    return _of_plan(text, _transfers_called) if ":" in text else parse_traffic(text)


def _of_plan(text: str, called: Callable[[Program, str], Iterator[_Key]]) -> _Key:
    """The op or transfer of a plan, at the plan's defaults, that ``PLAN:NAME`` means."""
    from mhcplan.planner.lowering.lower import lower
    from mhcplan.planner.lowering.recompute import resolve_recompute_block
    from mhcplan.planner.plan.file import resolve_plan

    source, _, name = text.rpartition(":")
    plan = resolve_plan(source, {}, ())
    program = lower(plan, resolve_recompute_block(plan))
    found = list(dict.fromkeys(called(program, name)))
    if not found:
        raise SpecError(f"{text!r} must name one of {', '.join(sorted(program.kinds))}")
    if len(found) > 1:
        several = ", ".join(f"'{key}'" for key in found)
        raise SpecError(f"{text!r} must be one op of the plan; these are so called: {several}")
    return found[0]


def _ops_called(program: Program, name: str) -> Iterator[OpKey]:
    kind, _, pass_ = name.partition(".")
    for text in program.cost_keys:
        key = parse_key(text)
        if isinstance(key, OpKey) and key.kind.startswith(kind) and pass_ in ("", key.pass_):
            yield key


def _transfers_called(program: Program, name: str) -> Iterator[TransferKey]:
    """Transfers of a kind, the largest: messages of a kind differ only where a model ends."""
    kinds = [i for i, kind in enumerate(program.kinds) if kind.startswith(name)]
    costs = {int(cost) for i in kinds for cost in program.cost[program.kind == i]}
    keys = [parse_key(program.cost_keys[cost]) for cost in costs]
    transfers = [key for key in keys if isinstance(key, TransferKey)]
    if transfers:
        yield max(transfers, key=lambda key: key.num_bytes)


# -- text ------------------------------------------------------------------------------------------


def _print(found: Overlap) -> None:
    from mhcplan.planner.report.table import Section, print_section

    console = output()
    longer = {"compute": found.compute_slowdown, "traffic": found.traffic_slowdown}
    console.print(
        f"{found.compute} takes {longer['compute']:.2f} times as long beside {found.traffic},"
        f" which takes {longer['traffic']:.2f} times as long",
        soft_wrap=True,
    )
    columns = ("", "alone us", "overlapped us", "times", "measured times", "error %")
    rows: list[tuple[str, ...]] = []
    for side, alone_ns in (("compute", found.compute_ns), ("traffic", found.traffic_ns)):
        measured = getattr(found.measured, f"{side}_slowdown", None)
        rows.append((
            side, f"{alone_ns / 1e3:,.1f}", f"{alone_ns * longer[side] / 1e3:,.1f}",
            f"{longer[side]:.2f}", "" if measured is None else f"{measured:.2f}",
            f"{getattr(found.error, f'{side}_percent'):.1f}",
        ))  # fmt: skip
    print_section(Section("", columns, tuple(rows)), console)
    console.print()
    for line in _lines(found):
        console.print(line, soft_wrap=True)


def _lines(found: Overlap) -> Iterator[str]:
    yield (
        f"a message waits {found.queue_ns / 1e3:,.1f} us for SMs on both ranks and is"
        f" {found.kernel_ns / 1e3:,.1f} us in its kernel"
    )
    if found.measured is not None:
        yield (
            f"  measured: {found.measured.queue_ns / 1e3:,.1f} us in the queue,"
            f" {found.measured.kernel_ns / 1e3:,.1f} us in the kernel, the wait for its peer"
            " included"
        )
    yield from (f"SMs: {text}" for text in found.why)
    yield (
        f"memory: the op takes {found.hbm_percent:.0f} % of the bandwidth, a message"
        f" {found.burden_percent:.0f} %; chains of loads and stores take"
        f" {found.chain_slowdown:.2f} times as long beside the op"
    )
    yield f"link: a message alone fills {found.link_percent:.0f} % of it"
    error = found.error
    of_how_many = f"mean of {error.pairs} pairs, {error.basis}: " if error.pairs > 1 else ""
    yield f"error: {of_how_many}{error.of}"
    yield from (f"extrapolated: {text}" for text in found.extrapolated)
