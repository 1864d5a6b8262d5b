"""A plan as arguments of Megatron-LM: its pipeline layout, and the flags that say the same.

Megatron takes no schedule; it runs 1F1B or interleaved 1F1B over the layout it is given, so other
schedules are refused rather than exported as something else. Its recompute block counts layers,
each of two sites.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhcplan.planner.plan.spec import SpecError
from mhcplan.profiles.specs import SITES_PER_BLOCK, Mla

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mhcplan.planner.plan.spec import PlanSpec

ARGUMENTS = "megatron.args"

_INTERLEAVED = "interleaved-1f1b"


def megatron_files(
    plan: PlanSpec, recompute_block: int | None, losses: tuple[str, ...]
) -> dict[str, str]:
    """The argument file: a flag a line, notes after #.

    Raises:
        SpecError: a schedule, residual or recompute block that Megatron cannot run.
    """
    _check(plan, recompute_block)
    notes = [f"# {line}" for line in (*_about(plan), *(f"Not said here: {x}" for x in losses))]
    return {ARGUMENTS: "\n".join([*notes, *_flags(plan, recompute_block)]) + "\n"}


def pipeline_layout(plan: PlanSpec) -> str:
    """The layout: E embedding, t a layer, m the multi-token-prediction head, L the loss; | between
    stages.

    >>> from mhcplan.planner.plan.spec import make_plan
    >>> layout = {"pp": 4, "ep": 1, "blocks_per_stage": [2, 3, 3, 4]}
    >>> pipeline_layout(make_plan({"model": "mhc-3b", "schedule": "1f1b", "layout": layout}))
    'Et*2|t*3|t*3|t*4L'
    """
    stages = [f"t*{len(blocks)}" if len(blocks) > 1 else "t" for blocks in plan.stages]
    return "E" + "|".join(stages) + ("mL" if plan.mtp else "L")


def _check(plan: PlanSpec, recompute_block: int | None) -> None:
    if plan.schedule not in ("1f1b", _INTERLEAVED):
        raise SpecError(
            f"schedule={plan.schedule} cannot be exported to megatron, which runs 1f1b and"
            " interleaved-1f1b only"
        )
    kind = plan.residual.kind
    if kind != "mhc" and not plan.residual.is_plain:
        raise SpecError(
            f"residual.kind={kind} cannot be exported to megatron, which has mhc and plain"
        )
    if plan.recompute_layers == "selective" or (
        plan.recompute_layers == "full" and not plan.residual.is_plain
    ):
        raise SpecError(
            f"recompute_layers={plan.recompute_layers} cannot be exported to megatron: it has none,"
            " and with the plain residual full"
        )
    if recompute_block is not None and recompute_block % SITES_PER_BLOCK:
        whole = [block for block in (recompute_block - 1, recompute_block + 1) if block]
        raise SpecError(
            f"residual.recompute_block={recompute_block} cannot be exported to megatron: its"
            f" mhc_recompute_layer_num counts layers, of {SITES_PER_BLOCK} sites each; take"
            f" {' or '.join(map(str, whole))}"
        )


def _about(plan: PlanSpec) -> Iterator[str]:
    yield f"Megatron-LM: {plan.model.name}, {plan.schedule} on {plan.layout.gpus} GPUs."
    if plan.schedule == "1f1b":
        yield "Megatron's 1F1B does not overlap its messages, so it takes longer than predicted."
    if not plan.residual.is_plain:
        yield (
            "mHC with pipeline parallelism needs the branch dev; main refuses it, and has"
            " --enable-mhc-connections and --mhc-num-residual-streams for the first two mHC flags."
        )


def _flags(plan: PlanSpec, recompute_block: int | None) -> Iterator[str]:
    layout = plan.layout
    yield f"--pipeline-model-parallel-size {layout.pp}"
    yield f'--pipeline-model-parallel-layout "{pipeline_layout(plan)}"'
    if plan.schedule == _INTERLEAVED:
        rounds = max(1, plan.microbatches // layout.pp)
        yield f"--microbatch-group-size-per-virtual-pipeline-stage {plan.microbatches // rounds}"
    yield f"--expert-model-parallel-size {layout.ep}"
    yield f"--micro-batch-size {plan.micro_batch_size}"
    yield f"--global-batch-size {plan.micro_batch_size * plan.microbatches * layout.replicas}"
    yield f"--seq-length {plan.seq_len}"
    yield f"--max-position-embeddings {plan.seq_len}"
    if plan.mtp:
        yield "--mtp-num-layers 1"
    yield "--bf16"
    yield "--use-distributed-optimizer"
    yield from _residual_flags(plan, recompute_block)
    yield from _model_flags(plan)


def _residual_flags(plan: PlanSpec, recompute_block: int | None) -> Iterator[str]:
    if plan.residual.is_plain:
        if plan.recompute_layers == "full":
            yield "--recompute-granularity full --recompute-method uniform"
            yield "--recompute-num-layers 1"
        return
    yield "--enable-hyper-connections"
    yield f"--num-residual-streams {plan.residual.expansion_rate}"
    yield f"--mhc-sinkhorn-iterations {plan.residual.sinkhorn_steps}"
    if recompute_block is not None:
        yield "--recompute-granularity selective"
        yield "--recompute-modules mhc"
        yield f"--mhc-recompute-layer-num {recompute_block // SITES_PER_BLOCK}"


def _model_flags(plan: PlanSpec) -> Iterator[str]:
    model, attention, moe = plan.model, plan.model.attention, plan.model.moe
    yield f"--num-layers {model.num_blocks}"
    yield f"--hidden-size {model.hidden_size}"
    yield f"--num-attention-heads {attention.num_heads}"
    if isinstance(attention, Mla):
        yield "--multi-latent-attention"
        yield f"--qk-head-dim {attention.qk_nope_head_dim}"
        yield f"--qk-pos-emb-head-dim {attention.qk_rope_head_dim}"
        yield f"--v-head-dim {attention.v_head_dim}"
        yield f"--kv-lora-rank {attention.kv_lora_rank}"
        if attention.q_lora_rank is not None:
            yield f"--q-lora-rank {attention.q_lora_rank}"
    else:
        yield "--group-query-attention"
        yield f"--num-query-groups {attention.num_kv_heads}"
        yield f"--kv-channels {attention.head_dim}"
    yield "--swiglu"
    yield "--normalization RMSNorm"
    yield "--disable-bias-linear"
    if not model.tied_embeddings:
        yield "--untie-embeddings-and-output-weights"
    if model.dense_ffn_dim is not None:
        yield f"--ffn-hidden-size {model.dense_ffn_dim}"
    if moe is None:
        return
    yield f"--num-experts {moe.num_experts}"
    yield f"--moe-router-topk {moe.top_k}"
    yield f"--moe-ffn-hidden-size {moe.ffn_dim}"
    if moe.num_shared_experts:
        yield f"--moe-shared-expert-intermediate-size {moe.num_shared_experts * moe.ffn_dim}"
    dense, sparse = model.num_dense_blocks, model.num_blocks - model.num_dense_blocks
    yield f'--moe-layer-freq "([0]*{dense}+[1]*{sparse})"'
    yield "--moe-grouped-gemm"
    yield "--moe-token-dispatcher-type alltoall"
