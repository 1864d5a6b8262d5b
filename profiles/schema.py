"""The profile file: what one machine was measured to cost, and where each figure comes from.

A profile is JSON (``format`` = ``mhcplan.profile``): the device and software it was measured on,
op timings, transfer timings and rates. Times are integer nanoseconds, sizes bytes, rates bytes (or
flops) per second. ``spread_percent`` is half the distance between the 10th and the 90th percentile
of the samples, as a share of the median.

Sources: ``measured`` (this shape on this device) or ``assumed`` (a published or datasheet figure;
``citation`` says which). *Interpolated* and *extrapolated* are properties of a look-up, never of a
row in a file.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from mhcplan.profiles.specs import HardwareSpec, Spec
from mhcplan.profiles.vocabulary import MEASURABLE, OpKey, op_key

if TYPE_CHECKING:
    from pathlib import Path

PROFILE_FORMAT = "mhcplan.profile"
PROFILE_VERSION = 1
SECOND_NS = 1_000_000_000
_TABLES = ("ops", "transfers", "contention_ops", "contention_pairs", "priorities")
_LATER_FIELDS = (
    "contention_ops", "contention_pairs", "contention_model", "power_model", "priorities",
)  # fmt: skip

Pattern = Literal["send_recv", "send_recv_both", "all_to_all", "all_to_all_uneven", "all_reduce",
                  "reduce_scatter", "all_gather"]  # fmt: skip
BETWEEN_TWO: tuple[Pattern, ...] = ("send_recv", "send_recv_both")
Medium = Literal["intra_node", "inter_node"]
MeasuredOrAssumed = Literal["measured", "assumed"]
# far beyond any machine, and far inside the integers that the engines count with
_Bounded = Annotated[float, Field(ge=0, le=1_000_000)]
_OverheadNs = Annotated[int, Field(ge=0, le=SECOND_NS)]


class ProfileError(ValueError):
    """A profile that cannot be used; the message is one line and names the field.

    ``problems`` are all its problems, "field: what is wrong"; the message has the first.
    """

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        """Keep ``problems`` beside the message."""
        super().__init__(message)
        self.problems = problems


class Figure(Spec):
    """Where a number comes from; ``citation`` is needed for an assumed one."""

    source: MeasuredOrAssumed
    citation: str = ""

    @model_validator(mode="after")
    def _assumed_is_cited(self) -> Self:
        if self.source == "assumed" and not self.citation:
            raise ValueError("source=assumed needs a citation")
        return self


class Segment(Spec):
    """A kernel of an op, as the SMs see it.

    ``ctas`` of which ``ctas_per_sm`` fit on one SM at once; ``cta_ns`` is the life of one CTA; a
    ``persistent`` kernel's CTAs live as long as the kernel. The op's duration is the sum of its
    segments' ``duration_ns`` and the gaps between them.
    """

    name: str
    duration_ns: PositiveInt
    ctas: PositiveInt
    ctas_per_sm: PositiveInt
    cta_ns: PositiveInt
    persistent: bool
    hbm_bytes: NonNegativeInt = 0


class OpTiming(Figure):
    """One op at one shape.

    ``duration_ns``: median time on the stream, hot; ``host_ns``: median time of the host to issue
    it; ``saved_bytes``, ``deferred_bytes``, ``workspace_bytes``: as the allocator saw them, None
    where not measured (workspace is the peak beyond inputs, outputs and what is kept). ``run``: the
    run that measured it, as its place in the profile's ``provenance``; None where nobody knows.
    """

    kind: str
    pass_: Annotated[str, Field(alias="pass", min_length=1, max_length=1)]
    shape: dict[str, NonNegativeInt]
    dtype: str = "bf16"
    duration_ns: PositiveInt
    spread_percent: Annotated[float, Field(ge=0)] = 0.0
    samples: NonNegativeInt = 0
    host_ns: NonNegativeInt
    segments: tuple[Segment, ...] = ()
    saved_bytes: NonNegativeInt | None = None
    deferred_bytes: NonNegativeInt | None = None
    workspace_bytes: NonNegativeInt | None = None
    run: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _in_vocabulary(self) -> Self:
        if self.kind not in MEASURABLE:
            raise ValueError(f"kind={self.kind!r} is not an op of this version")
        op_key(self.kind, self.pass_, **self.shape)
        return self

    @property
    def key(self) -> OpKey:
        """What this row is looked up by."""
        return op_key(self.kind, self.pass_, **self.shape)


class TransferTiming(Figure):
    """One message size of one pattern.

    ``bytes``: of the buffer on each rank: the message (send_recv), the whole send buffer with the
    own part (all_to_all), the full tensor (all_reduce, reduce_scatter input, all_gather output). In
    an uneven all_to_all every rank sends one and a half times an even share to the first one.
    ``run``: as of an op.
    """

    pattern: Pattern
    medium: Medium = "intra_node"
    group_size: Annotated[int, Field(ge=2)]
    bytes: PositiveInt
    duration_ns: PositiveInt
    spread_percent: Annotated[float, Field(ge=0)] = 0.0
    samples: NonNegativeInt = 0
    host_ns: NonNegativeInt = 0
    ctas: NonNegativeInt | None = None
    run: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _messages_have_two_ends(self) -> Self:
        if self.pattern in BETWEEN_TWO and self.group_size != 2:
            raise ValueError(f"group_size={self.group_size} must be 2: {self.pattern} has two ends")
        return self


class ContentionOp(Figure):
    """A kernel that was overlapped with traffic: ``name`` of the case, ``family`` of kernels that
    it stands for, ``duration_ns`` of the op alone with the gaps between its kernels."""

    name: str
    family: str
    duration_ns: PositiveInt
    segments: tuple[Segment, ...]


class ContentionPair(Figure):
    """What a kernel and traffic did to each other while both streams were kept full.

    ``op``: of :class:`ContentionOp`; ``bytes``: as in :class:`TransferTiming`; ``ctas``: SMs that
    the traffic's kernel held (0: a copy engine); ``both_busy``: whether both ranks computed or only
    the first. Slowdowns are time beside the other over time alone, means. ``alone_ns``: of a
    message from start to start, alone; beside the kernel it waited ``queue_ns`` from the end of the
    one before and was ``kernel_ns`` in its kernel, the wait for its peer included.
    """

    op: str
    pattern: Literal["send_recv", "send_recv_both", "all_to_all", "copy_engine"]
    bytes: PositiveInt
    ctas: NonNegativeInt
    high_priority: bool = False
    both_busy: bool = True
    compute_slowdown: Annotated[float, Field(gt=0)]
    traffic_slowdown: Annotated[float, Field(gt=0)]
    alone_ns: PositiveInt
    queue_ns: NonNegativeInt
    kernel_ns: NonNegativeInt
    samples: NonNegativeInt = 0


class PriorityLatency(Figure):
    """How long a short kernel waited for a chip that another kept busy.

    ``resident``: what kept it busy; ``level``: priority of the short kernel's stream against the
    resident's; ``ctas`` of the short kernel; ``connections``: CUDA_DEVICE_MAX_CONNECTIONS.
    ``start_ns``, ``end_ns``: medians, from the host's launch call.
    """

    resident: str
    level: Literal["equal", "high"]
    ctas: PositiveInt
    connections: PositiveInt
    start_ns: NonNegativeInt
    end_ns: NonNegativeInt
    spread_percent: Annotated[float, Field(ge=0)] = 0.0
    samples: NonNegativeInt = 0


class KernelTrait(Spec):
    """What a launch does not show of kernels whose name contains ``name``: see
    :class:`mhcplan.sim.device_kernels.Kernel`; ``is_attention``: a plan may ask for CTAs that end
    one by one instead, which the library's other kernels have; an op takes the time of this one
    ``preemptible_times`` with them."""

    name: str
    pieces: NonNegativeInt = 0
    dealt: bool = True
    tail_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    is_attention: bool = False
    preemptible_times: Annotated[float, Field(gt=0)] = 1.0


CtasBySize = Annotated[tuple[tuple[NonNegativeInt, PositiveInt], ...], Field(min_length=1)]


class TrafficTrait(Figure):
    """What a duration does not show of the library's kernels for one pattern.

    ``ctas``: pairs of least bytes and the CTAs that messages from that size on take, ascending;
    ``limited``: the same for each limit that a plan may set (``comm_ctas``), of which a message may
    take a part, between two ranks mostly half; ``cta_bytes_per_ns``: that one CTA moves, of the
    bytes of :class:`TransferTiming`; ``fixed_ns``: what does not depend on the size;
    ``sent_hbm_factor``, ``received_hbm_factor``: bytes of memory traffic at a sender, and at a
    receiver or a member of a collective, for each of those bytes.
    Between nodes, a pattern without a row of its own has that of ``intra_node``.
    """

    pattern: Pattern
    medium: Medium = "intra_node"
    ctas: CtasBySize
    limited: tuple[tuple[PositiveInt, CtasBySize], ...] = ()
    cta_bytes_per_ns: Annotated[float, Field(gt=0)]
    fixed_ns: NonNegativeInt
    sent_hbm_factor: _Bounded
    received_hbm_factor: _Bounded


class ContentionModel(Figure):
    """The fitted model: fields of :class:`mhcplan.sim.device_kernels.Parameters`, traits of
    kernels and of traffic, and its mean error |predicted / measured - 1| on ``held_out_pairs`` it
    was not fitted on."""

    parameters: dict[str, _Bounded]
    traits: tuple[KernelTrait, ...] = ()
    traffic: tuple[TrafficTrait, ...] = ()
    held_out_pairs: NonNegativeInt = 0
    compute_error_percent: Annotated[float, Field(ge=0)] = 0.0
    traffic_error_percent: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _has_a_machine(self) -> Self:
        for name in ("num_sms", "hbm_bytes_per_ns"):  # shares are shares of these
            if (value := self.parameters.get(name, 1)) < 1:
                raise ValueError(f"parameters.{name}={value} must be at least 1")
        return self


class PowerModel(Figure):
    """What a GPU draws, and how much slower arithmetic gets once that passes a threshold.

    Under a steady load a GPU at its full clock would draw ``active_watts`` while kernels run,
    ``idle_watts`` between them, and ``joules_per_tflop`` for arithmetic. Beyond ``free_watts`` the
    clock falls; arithmetic then takes 1 + ``stretch`` (watts / ``free_watts`` - 1) as long.

    Attributes:
        tflops: bf16 matrix rate at the full clock, 10^12 a second.
        limit_watts: power limit that the driver enforces; ``window_ms``: how long a load lasts
            before the clock follows.
        error_percent: mean error of the stretched times of the loads that were measured.
    """

    limit_watts: Annotated[float, Field(gt=0)]
    idle_watts: _Bounded
    active_watts: _Bounded
    joules_per_tflop: _Bounded
    free_watts: Annotated[float, Field(ge=1)]
    stretch: Annotated[float, Field(ge=0, le=10)]
    tflops: Annotated[float, Field(ge=1)]
    window_ms: Annotated[float, Field(ge=1, le=10_000)] = 50.0
    error_percent: Annotated[float, Field(ge=0)] = 0.0


class Rate(Figure):
    """A ceiling measured in the same session: what the machine can do at best."""

    name: Literal["copy_bytes", "gemm_bf16_flops", "read_bytes"]
    per_second: PositiveInt
    spread_percent: Annotated[float, Field(ge=0)] = 0.0


class Overheads(Figure):
    """Costs that belong to no op, in ns and bytes.

    ``graph_gap_ns``: by how much sooner a kernel of a CUDA graph follows the one before it than a
    kernel that the host launched on a stream; ``graph_launch_ns``: what each graph on a stream
    takes beyond its kernels. 0 where they were not measured.
    """

    launch_ns: _OverheadNs
    event_record_ns: _OverheadNs
    event_wait_ns: _OverheadNs
    context_bytes: NonNegativeInt
    communicator_bytes: NonNegativeInt
    allocator_margin_percent: _Bounded
    graph_gap_ns: _OverheadNs = 0
    graph_launch_ns: _OverheadNs = 0


class Provenance(Spec):
    """What ran, on what, when, and how to run it again."""

    device: str
    num_devices: PositiveInt
    driver: str
    sm_clock_mhz: NonNegativeInt
    power_watts: Annotated[float, Field(ge=0)]
    versions: dict[str, str]
    environment: dict[str, str]
    measured_on: str
    command: str
    code_sha256: str


# Digests of the profiles that are alive, by id: making one takes as long as playing a step.
_digests: dict[int, tuple[weakref.ref[Any], str]] = {}


class Profile(Spec):
    """A whole profile file; see the module's docstring."""

    format: Literal["mhcplan.profile"] = PROFILE_FORMAT
    format_version: Annotated[int, Field(ge=1, le=PROFILE_VERSION)] = PROFILE_VERSION
    name: str
    hardware: HardwareSpec
    provenance: tuple[Provenance, ...]
    rates: tuple[Rate, ...]
    overheads: Overheads
    ops: tuple[OpTiming, ...]
    transfers: tuple[TransferTiming, ...]
    contention_ops: tuple[ContentionOp, ...] = ()
    contention_pairs: tuple[ContentionPair, ...] = ()
    contention_model: ContentionModel | None = None
    power_model: PowerModel | None = None
    priorities: tuple[PriorityLatency, ...] = ()

    @model_validator(mode="after")
    def _pairs_have_ops(self) -> Self:
        ops = {op.name for op in self.contention_ops}
        for index, pair in enumerate(self.contention_pairs):
            if pair.op not in ops:
                raise ValueError(f"contention_pairs.{index}.op: {pair.op!r} is no contention op")
        return self

    @model_validator(mode="after")
    def _runs_are_there(self) -> Self:
        for name, rows in (("ops", self.ops), ("transfers", self.transfers)):
            for index, row in enumerate(rows):
                if row.run is not None and row.run >= len(self.provenance):
                    raise ValueError(f"{name}.{index}.run: {row.run} is no entry of provenance")
        return self

    @model_validator(mode="after")
    def _no_row_twice(self) -> Self:
        seen: set[object] = set()
        for row in self.ops:
            if row.key in seen:
                raise ValueError(f"ops: {row.key} appears twice")
            seen.add(row.key)
        for row in self.transfers:
            key = (row.pattern, row.medium, row.group_size, row.bytes)
            if key in seen:
                raise ValueError(f"transfers: {key} appears twice")
            seen.add(key)
        return self

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON: equal profiles have equal digests."""
        known = _digests.get(id(self))
        if known is None or known[0]() is not self:
            forget = partial(_digests.pop, id(self), None)
            known = weakref.ref(self, lambda _: forget()), self._make_digest()
            _digests[id(self)] = known
        return known[1]

    def _make_digest(self) -> str:
        data = self.model_dump(mode="json", by_alias=True)
        for name in _LATER_FIELDS:  # so that a profile without them keeps its digest
            if not data[name]:
                del data[name]
        for name in ("graph_gap_ns", "graph_launch_ns"):
            if not data["overheads"][name]:
                del data["overheads"][name]
        for row in (*data["ops"], *data["transfers"]):
            if row["run"] is None:
                del row["run"]
        model: dict[str, Any] = data.get("contention_model") or {}
        for trait in model.get("traits", ()):
            if trait["preemptible_times"] == 1.0:
                del trait["preemptible_times"]
        for trait in model.get("traffic", ()):
            if not trait["limited"]:
                del trait["limited"]
        text = json.dumps(data, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def parse_profile(text: str, origin: str) -> Profile:
    """Read a profile from JSON text; ``origin`` names it in errors.

    Types are strict: "350", 350.0 and true are no integers, so that a slip of the pen is not read
    as a figure.

    Raises:
        ProfileError: malformed JSON, another format, a newer version, or a bad field (named).
    """
    try:
        profile = Profile.model_validate_json(text, strict=True)
    except ValidationError as error:
        _check_header(text, origin)
        problems = tuple(
            f"{'.'.join(map(str, found['loc'])) or 'profile'}:"
            f" {found['msg'].removeprefix('Value error, ')}"
            for found in error.errors(include_url=False, include_context=False)
        )
        raise ProfileError(f"{origin}: {problems[0]}", problems) from None
    if not {"format", "format_version"} <= profile.model_fields_set:
        _check_header(text, origin)
    return profile


def _check_header(text: str, origin: str) -> None:
    """Refuse what is no JSON, other files and newer versions, before fields are called unknown."""
    try:
        raw: object = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ProfileError(f"{origin}: not valid JSON ({error.msg}, line {error.lineno})") from None
    except ValueError:
        raise ProfileError(f"{origin}: not valid JSON (a number of too many digits)") from None
    except RecursionError:
        raise ProfileError(f"{origin}: not valid JSON (nested too deeply)") from None
    if not isinstance(raw, dict):
        raise ProfileError(f"{origin}: format is not {PROFILE_FORMAT!r}: the file is no object")
    header = cast("dict[str, object]", raw)
    if header.get("format") != PROFILE_FORMAT:
        raise ProfileError(f"{origin}: format={header.get('format')!r} is not {PROFILE_FORMAT!r}")
    version = header.get("format_version")
    if version is None:
        raise ProfileError(f"{origin}: format_version: is missing")
    if isinstance(version, int) and version > PROFILE_VERSION:
        raise ProfileError(
            f"{origin}: format_version={version} is newer than this mhcplan reads"
            f" (up to {PROFILE_VERSION}); upgrade mhcplan"
        )


def _refuse_constant(name: str) -> float:
    raise json.JSONDecodeError(f"{name} is no number", name, 0)


def read_profile(path: Path) -> Profile:
    """Read a profile file.

    Raises:
        ProfileError: unreadable file, or see :func:`parse_profile`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: cannot be read ({error})") from None
    return parse_profile(text, str(path))


def profile_text(profile: Profile) -> str:
    """The file's text: one row a line, so that profiles can be compared by eye and by diff."""
    data = profile.model_dump(mode="json", by_alias=True, exclude_none=True)
    for name in _LATER_FIELDS:
        if not data.get(name):
            data.pop(name, None)
    tables = [name for name in _TABLES if name in data]
    head = {k: v for k, v in data.items() if k not in tables}
    lines = [json.dumps(head, indent=1)[:-2]]
    for table in tables:
        rows = ",\n  ".join(json.dumps(row) for row in data[table])
        lines.append(f',\n "{table}": [\n  {rows}\n ]' if rows else f',\n "{table}": []')
    return "".join(lines) + "\n}\n"
