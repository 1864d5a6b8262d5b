"""One what-if: everything that decides a predicted step, as one frozen pydantic model.

A :class:`PlanSpec` is what the command line, a plan file, the web page and a notebook all build,
and all that the schedule, the lowering and the simulator read. It holds no numbers about hardware
but a memory limit: costs come from the profile that it names. Letters: P = ``layout.pp``,
M = ``microbatches``, n = ``residual.expansion_rate``, L_r = ``residual.recompute_block``.

A plan is legal or it is not built: what spans fields (stages and blocks, experts and ``ep``, P and
M of the schedule) is checked here, once, with one line that names field, value and what is valid.

Not modelled, and so no field: tensor, context and fully sharded parallelism, offloading, skewed
routing, low-precision training.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from mhcplan.planner.plan.errors import describe
from mhcplan.planner.schedules.catalogue import Schedule, build_schedule
from mhcplan.planner.schedules.phase_orders import OverlapOrder
from mhcplan.profiles.loads import Attention, GpuSettings
from mhcplan.profiles.parameters import model_parameters
from mhcplan.profiles.presets import find_model
from mhcplan.profiles.specs import ModelSpec, ResidualSpec, Spec

if TYPE_CHECKING:
    from collections.abc import Mapping

PLAN_FORMAT = "mhcplan.plan"
PLAN_VERSION = 1

ScheduleName = Literal["1f1b", "interleaved-1f1b", "zb1p", "zbv", "dualpipe", "dualpipev"]
Priority = Literal["none", "post", "recompute", "all"]
P2P = Literal["eager", "grouped"]
CommStreams = Literal["two", "one"]
ReceiveBuffers = Literal["pooled", "per_microbatch"]
RecomputeLayers = Literal["none", "selective", "full"]
Engine = Literal["compiled", "simpy"]
Contention = Literal["on", "off"]
Power = Literal["limited", "unlimited"]
CommPriority = Literal["normal", "high"]

MAX_CELLS = 1 << 18  # P x M: a step beyond this is too large to play op by op
MAX_BLOCKS = 4096
MAX_TOKENS = 1 << 22  # T: sizes in bytes stay far inside 64 bits
MAX_PARAMETERS = 10**13
TOKENS_MULTIPLE = 64  # kernels are measured at whole tiles, ragged ones take other code


class SpecError(ValueError):
    """A plan that cannot be run; the message is one line: field, value and what is valid."""


def _count(most: int, description: str = "") -> Any:  # noqa: ANN401 - FieldInfo as Any, as pydantic's
    return Field(ge=1, le=most, strict=True, description=description or None)


def _about(description: str) -> Any:  # noqa: ANN401
    return Field(description=description)


def _model_of(value: object) -> object:
    return find_model(value) if isinstance(value, str) else value


class LayoutSpec(Spec):
    """How GPUs are used: GPUs = pp x ep x dp, placed ep fastest, then dp, then pp."""

    pp: Annotated[int, _count(4096, "pipeline ranks P")] = 8
    ep: Annotated[
        int, _count(65536, "ranks that split the routed experts; all else is replicated over them")
    ] = 8
    dp: Annotated[int, _count(65536, "replicas of an expert-parallel group")] = 1
    gpus_per_node: Annotated[int, _count(1024, "GPUs of one node: what leaves it is slower")] = 8
    blocks_per_stage: Annotated[
        tuple[Annotated[int, _count(MAX_BLOCKS)], ...] | None,
        _about(
            "transformer blocks of every stage, in depth order; without it they are shared evenly,"
            " remainders to the earliest stages"
        ),
    ] = None

    @property
    def gpus(self) -> int:
        """All GPUs of the job."""
        return self.pp * self.ep * self.dp

    @property
    def replicas(self) -> int:
        """Pipelines, each of which trains its own microbatches: ep x dp."""
        return self.ep * self.dp


def _unsplit_without_experts(layout: LayoutSpec, info: ValidationInfo) -> LayoutSpec:
    """A dense model has nothing to split: there, ep is 1 unless somebody asked for more."""
    model: ModelSpec | None = info.data.get("model")
    if model is None or model.moe is not None or "ep" in layout.model_fields_set:
        return layout
    return layout.model_copy(update={"ep": 1})


class PlanSpec(Spec):
    """A training step to predict; every field says in its description what it decides."""

    model: Annotated[
        ModelSpec,
        BeforeValidator(_model_of, json_schema_input_type=str | ModelSpec),
        _about("the transformer: a preset's name or all its sizes"),
    ]
    residual: Annotated[
        ResidualSpec, _about("how sublayers are joined, and mHC's recompute block")
    ] = ResidualSpec()
    layout: Annotated[
        LayoutSpec,
        AfterValidator(_unsplit_without_experts),
        Field(description="how the GPUs are used", validate_default=True),
    ] = LayoutSpec()
    microbatches: Annotated[
        int, _count(MAX_CELLS, "M of one replica, of both DualPipe directions together")
    ] = 64
    micro_batch_size: Annotated[int, _count(MAX_TOKENS, "sequences in a microbatch")] = 1
    seq_len: Annotated[int, _count(MAX_TOKENS, "tokens in a sequence")] = 4096
    schedule: Annotated[ScheduleName, _about("pipeline schedule")] = "dualpipe"
    priority: Annotated[
        Priority,
        _about(
            "mHC ops on the high-priority stream: post takes F_post,res of MLP sites, recompute"
            " those and the recompute, all every mHC op"
        ),
    ] = "post"
    p2p: Annotated[
        P2P,
        _about(
            "pipeline messages: eager posts each by itself, grouped in batches between two actions"
        ),
    ] = "eager"
    receive_buffers: Annotated[
        ReceiveBuffers,
        _about(
            "memory of received messages: pooled takes a buffer from the receive to its last use,"
            " per_microbatch holds one for every microbatch, stage and direction through the step,"
            " as torch's pipelining up to 2.14 does"
        ),
    ] = "pooled"
    comm_streams: Annotated[
        CommStreams,
        _about("expert and pipeline traffic: two have streams of their own, one shares a stream"),
    ] = "two"
    contention: Annotated[
        Contention,
        _about(
            "on: kernels and communication share SMs, memory and links, as far as the profile says"
            " how; off: they leave each other alone"
        ),
    ] = "on"
    power: Annotated[
        Power,
        _about(
            "limited: arithmetic takes as long as the clock that the GPU's power limit leaves it,"
            " as far as the profile says; unlimited: the full clock"
        ),
    ] = "limited"
    network_speed: Annotated[
        float,
        Field(
            ge=0.001,
            le=1000,
            allow_inf_nan=False,
            description="bandwidth of the network between nodes, times what the profile says of it:"
            " 0.5 is half as fast; its latency stays",
        ),
    ] = 1.0
    comm_ctas: Annotated[
        Annotated[int, _count(64)] | None,
        _about("SMs that a communication kernel takes at most; without it, as many as measured"),
    ] = None
    comm_priority: Annotated[
        CommPriority, _about("priority of the communication streams; high as mHC's own stream")
    ] = "normal"
    compute_sms: Annotated[
        Annotated[int, _count(1024)] | None,
        _about(
            "SMs that compute kernels may use, as by a green context; without it, all. Kernels are"
            " launched as for all, so those that fill the GPU once take two waves"
        ),
    ] = None
    attention: Annotated[
        Attention,
        _about(
            "CTAs of attention kernels: persistent ones stay to the kernel's end, preemptible ones"
            " end one by one and let urgent kernels in"
        ),
    ] = "persistent"
    max_connections: Annotated[
        int,
        Field(
            ge=1,
            le=32,
            strict=True,
            description="hardware queues that a GPU's streams share: CUDA_DEVICE_MAX_CONNECTIONS",
        ),
    ] = 8
    mtp: Annotated[
        bool,
        Field(
            strict=True,
            description="a multi-token-prediction head of depth 1 on the last stage, as"
            " DeepSeek-V3's",
        ),
    ] = False
    recompute_layers: Annotated[
        RecomputeLayers,
        _about(
            "sublayers that keep only their input and run again before their backward, beside"
            " mHC's recompute block: selective takes attention, full all of them, experts' traffic"
            " included"
        ),
    ] = "none"
    overlap_order: Annotated[
        OverlapOrder,
        _about(
            "order of an F beside a B: mhc as in figure 4 of the mHC paper, v3 as in DeepSeek-V3's,"
            " where F_post,res of an FFN is issued with the attention after it"
        ),
    ] = "mhc"
    overlap_recompute: Annotated[
        bool, Field(strict=True, description="recompute may run before its gradient arrives")
    ] = True
    profile: Annotated[
        str, Field(min_length=1, description="name of a shipped profile, or path of a file")
    ] = "h100-sxm"
    engine: Annotated[
        Engine,
        _about(
            "what plays the program: compiled is machine code, simpy the readable reference; both"
            " give the same times"
        ),
    ] = "compiled"
    memory_limit_bytes: Annotated[
        Annotated[ByteSize, Field(ge=1_000_000)] | None,  # less is GB without their unit
        _about("memory of one GPU in bytes, or as '80GB'; without it, that of the profile's GPU"),
    ] = None

    @model_validator(mode="after")
    def _is_legal(self) -> Self:
        _check_size(self)
        _check_experts(self)
        _check_stages(self)
        _check_messages(self)
        _check_gpu(self)
        return self

    @property
    def tokens(self) -> int:
        """T: tokens of one microbatch on one rank."""
        return self.micro_batch_size * self.seq_len

    @property
    def global_batch(self) -> int:
        """Sequences that the whole job trains in one step, whatever the schedule."""
        return self.microbatches * self.micro_batch_size * self.layout.replicas

    @property
    def tokens_per_step(self) -> int:
        """Tokens that the whole job trains in one step, whatever the schedule."""
        return self.tokens * self.microbatches * self.layout.replicas

    @property
    def stages(self) -> tuple[range, ...]:
        """Transformer blocks of every stage, in depth order, cut at block borders."""
        return stage_blocks(self.model.num_blocks, self.num_stages, self.layout.blocks_per_stage)

    @property
    def num_stages(self) -> int:
        """Stages of one copy of the model."""
        return schedule_of(self).num_stages

    @property
    def gpu(self) -> GpuSettings | None:
        """How contention is played; None: not at all."""
        if self.contention == "off":
            return None
        return GpuSettings(
            self.comm_ctas, self.compute_sms, self.attention, self.max_connections
        )  # fmt: skip

    def baseline(self) -> PlanSpec:
        """The same plan with the plain residual: what mHC's overhead is measured against."""
        return self.model_copy(update={"residual": ResidualSpec(kind="plain", expansion_rate=1)})

    def digest(self) -> str:
        """sha256 of the canonical JSON: equal plans have equal digests, and no others."""
        data = self.model_dump(mode="json")
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


def make_plan(data: Mapping[str, object]) -> PlanSpec:
    """Validate a plan given as nested mappings; ``model`` may be a preset's name.

    Raises:
        SpecError: a field that is unknown, missing or not valid; the first one is named.
    """
    try:
        return PlanSpec.model_validate(data)
    except ValidationError as error:
        raise SpecError(describe(error, PlanSpec)) from None


def schedule_of(plan: PlanSpec) -> Schedule:
    """The action table of the plan's schedule; equal (name, P, M) share one."""
    return build_schedule(plan.schedule, plan.layout.pp, plan.microbatches)


def stage_blocks(
    num_blocks: int, num_stages: int, blocks_per_stage: tuple[int, ...] | None = None
) -> tuple[range, ...]:
    """Cut a model's blocks into stages: as told, or evenly with remainders to the earliest.

    >>> [len(stage) for stage in stage_blocks(30, 8)]
    [4, 4, 4, 4, 4, 4, 3, 3]
    """
    if blocks_per_stage is None:
        share, rest = divmod(num_blocks, num_stages)
        blocks_per_stage = tuple(share + (stage < rest) for stage in range(num_stages))
    stages: list[range] = []
    first = 0
    for blocks in blocks_per_stage:
        stages.append(range(first, first + blocks))
        first += blocks
    return tuple(stages)


def _check_size(plan: PlanSpec) -> None:
    if plan.seq_len % TOKENS_MULTIPLE:
        raise ValueError(f"seq_len={plan.seq_len} must be a multiple of {TOKENS_MULTIPLE}")
    if plan.tokens > MAX_TOKENS:
        raise ValueError(
            f"micro_batch_size={plan.micro_batch_size} must be at most"
            f" {MAX_TOKENS // plan.seq_len} with seq_len={plan.seq_len}"
        )
    cells = plan.layout.pp * plan.microbatches
    if cells > MAX_CELLS:
        raise ValueError(
            f"microbatches={plan.microbatches} must be at most {MAX_CELLS // plan.layout.pp} with"
            f" layout.pp={plan.layout.pp}: the step is played op by op"
        )
    if plan.model.num_blocks > MAX_BLOCKS:
        raise ValueError(f"model.num_blocks={plan.model.num_blocks} must be at most {MAX_BLOCKS}")
    if model_parameters(plan.model, plan.residual).total > MAX_PARAMETERS:
        raise ValueError(
            f"model: {plan.model.name} has more than {MAX_PARAMETERS:.0e} parameters, the most that"
            " are counted"
        )


def _check_experts(plan: PlanSpec) -> None:
    ep, moe = plan.layout.ep, plan.model.moe
    if moe is None and ep > 1:
        raise ValueError(f"layout.ep={ep} must be 1: {plan.model.name} has no experts to split")
    if moe is not None and moe.num_experts % ep:
        raise ValueError(
            f"layout.ep={ep} must divide the {moe.num_experts} experts of {plan.model.name}"
        )


def _check_messages(plan: PlanSpec) -> None:
    """One group for all messages needs batches, and batches that agree on both ends: DualPipe's."""
    if plan.p2p == "grouped" and plan.schedule not in ("dualpipe", "dualpipev"):
        raise ValueError(
            f"p2p=grouped goes with dualpipe and dualpipev: schedule={plan.schedule} takes eager"
        )
    if plan.comm_streams == "one" and plan.p2p != "grouped":
        raise ValueError(
            "comm_streams=one needs p2p=grouped: single messages would block each other"
        )


def _check_stages(plan: PlanSpec) -> None:
    blocks, cut = plan.model.num_blocks, plan.layout.blocks_per_stage
    stages = plan.num_stages  # raises where the schedule cannot run this P and M
    if stages > blocks:
        raise ValueError(
            f"layout.pp={plan.layout.pp} makes {stages} stages with {plan.schedule}, more than the"
            f" {blocks} blocks of {plan.model.name}"
        )
    if cut is not None and (len(cut) != stages or sum(cut) != blocks):
        raise ValueError(
            f"layout.blocks_per_stage={list(cut)} must be {stages} numbers that sum to {blocks}"
        )


def _check_gpu(plan: PlanSpec) -> None:
    """Settings of the contention model mean nothing without it."""
    for name in ("comm_ctas", "compute_sms"):
        if plan.contention == "off" and getattr(plan, name) is not None:
            raise ValueError(f"{name}={getattr(plan, name)} needs contention=on")
