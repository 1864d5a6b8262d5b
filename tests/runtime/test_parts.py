"""The parts around the executor: parameters, data, groups, traces, CUDA's streams on a stand-in."""

from __future__ import annotations

import gc
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mhcplan.profiles.parameters import model_parameters, stage_parameters
from mhcplan.runtime import groups as groups_module
from mhcplan.runtime import streams as streams_module
from mhcplan.runtime.data import TextBatches, tokens_of_corpus
from mhcplan.runtime.groups import Call, Groups, Handle, Place, instances
from mhcplan.runtime.launch import launch
from mhcplan.runtime.measure import peak_memory, time_steps, trace_step
from mhcplan.runtime.model import Stage, build_stage
from mhcplan.runtime.spec import RunError, RunSpec, stage_blocks
from mhcplan.runtime.streams import CudaStreams, StreamPool
from mhcplan.runtime.trace import measured_timeline
from mhcplan.runtime.train import Session, Trainer
from mhcplan.sim.files import read_trace, write_trace
from mhcplan.sim.program import Group, Stream
from mhcplan.sim.timeline import REASONS
from tests.runtime.plans import make_case
from tests.support.programs import Maker


def stage_of(
    spec: RunSpec, blocks: range, index: int = 0, shares: int = 1, **optimizer: object
) -> Stage:
    return build_stage(
        spec, blocks, expert_index=index, shares=dict.fromkeys(("dense", "experts"), (0, shares)),
        device=torch.device("cpu"), loss_scale=1.0, optimizer=optimizer,
    )  # fmt: skip


# -- parameters


@pytest.mark.parametrize(
    "options",
    [{"n": 4}, {"n": 1}, {"kind": "hc", "n": 2}, {"model": {"moe": None, "num_dense_blocks": 4}}],
)
def test_a_model_holds_what_the_planner_counts(options: dict[str, Any]) -> None:
    spec = make_case("counts", schedule="1f1b", **options).spec
    whole = stage_of(spec, range(4)).parameters.num_elements
    assert whole == model_parameters(spec.model, spec.residual).total
    for blocks in (range(2), range(2, 4)):
        held = stage_of(spec, blocks).parameters.num_elements
        assert held == stage_parameters(spec.model, spec.residual, blocks).total


@pytest.mark.parametrize("decay_vectors", [True, False])
def test_vectors_decay_unless_they_are_not_to(decay_vectors: bool) -> None:
    """Without a gradient a step is the decay alone."""
    spec = make_case("decay", schedule="1f1b", n=2).spec
    parameters = stage_of(spec, range(4), lr=0.5, decay=0.5, decay_vectors=decay_vectors).parameters
    before = {name: weight.data.clone() for name, weight in parameters.weights.items()}
    for section in parameters.all_sections():
        section.adamw.step()
    kept = {name: weight.data.ndim == 1 and not decay_vectors
            for name, weight in parameters.weights.items()}  # fmt: skip
    assert before["head.norm"].ndim == before["collapse.alpha"].ndim == 1
    for name, weight in parameters.weights.items():
        torch.testing.assert_close(weight.data, before[name] * (1 if kept[name] else 0.75))


def test_weights_do_not_depend_on_where_they_lie() -> None:
    spec = make_case("placement", schedule="1f1b").spec
    whole = stage_of(spec, range(4)).parameters.weights
    half = stage_of(replace(spec, ep=2), range(2, 4), index=1, shares=3).parameters.weights
    for name, weight in half.items():
        right = whole[name].data
        right = right.chunk(2)[1] if ".experts." in name else right
        assert torch.equal(weight.data, right), name
    assert not torch.equal(
        whole["blocks.2.attention.out"].data, whole["blocks.3.attention.out"].data
    )


def test_every_parameter_starts_where_matrix_units_can_read() -> None:
    spec = replace(make_case("aligned", schedule="1f1b").spec, dtype=torch.bfloat16)
    for weight in stage_of(spec, range(4), shares=3).parameters.weights.values():
        for x in (weight.data, weight.main_grad):
            assert x.storage_offset() * x.element_size() % 128 == 0


def test_learned_routing_over_several_ranks_is_refused() -> None:
    spec = make_case("refused", schedule="1f1b", pp=1, ep=2).spec
    with pytest.raises(RunError, match="routing=learned needs ep=1"):
        replace(spec, routing="learned").check()


@pytest.mark.parametrize("field", [{"mtp": True}, {"recompute_layers": "full"}], ids=str)
def test_what_only_the_simulator_has_is_refused(field: dict[str, object]) -> None:
    with pytest.raises(RunError, match=f"{next(iter(field))}=.* the runtime has"):
        make_case("refused", schedule="1f1b", **field).spec  # noqa: B018


# -- data


def test_tokens_repeat_and_differ_by_step_and_microbatch() -> None:
    text = TextBatches(1024, tokens=128, seq_len=64, seed=5)
    ids, targets = text.microbatch(3, 7)
    again = TextBatches(1024, tokens=128, seq_len=64, seed=5).microbatch(3, 7)
    assert torch.equal(ids, again[0])
    assert torch.equal(targets, again[1])
    assert torch.equal(ids.view(2, 64)[:, 1:], targets.view(2, 64)[:, :-1])
    for step, number in ((4, 7), (3, 8)):
        assert not torch.equal(ids, text.microbatch(step, number)[0])


def test_the_vocabulary_is_used() -> None:
    tokens = tokens_of_corpus(1024)
    assert len(tokens) > 100_000
    assert 0 <= int(tokens.min()) < int(tokens.max()) < 1024
    assert len(tokens.unique()) > 700
    with pytest.raises(ValueError, match="at least 256"):
        tokens_of_corpus(255)


# -- groups


def test_process_groups_of_two_stages_two_expert_ranks_two_replicas() -> None:
    """Processes number ep fastest, then dp, then the pipeline rank: rank r has 4 r .. 4 r + 3."""
    pipe = instances(Group("pp_f:0>1", (0, 1), 2, "intra_node"), ep=2, dp=2)
    assert pipe == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert instances(Group("ep:1", (1,), 2, "intra_node"), ep=2, dp=2) == [[4, 5], [6, 7]]
    assert instances(Group("dp:0", (0,), 4, "intra_node"), ep=2, dp=2) == [[0, 1, 2, 3]]
    experts = instances(Group("dp_experts:0-1", (0, 1), 4, "intra_node"), ep=2, dp=2)
    assert experts == [[0, 2, 4, 6], [1, 3, 5, 7]]
    with pytest.raises(RunError, match="has 3 members"):
        instances(Group("dp:0", (0,), 3, "intra_node"), ep=2, dp=2)


# -- traces


def test_causes_of_measured_times() -> None:
    maker = Maker(2)
    flow = maker.group("pp_f:0>1", 0, 1)
    a = maker.op(0, 10)
    send = maker.transfer(0, flow, 5, to=1, waits=[a])
    b = maker.op(0, 10)
    receive = maker.transfer(1, flow, 5, source=0)
    c = maker.op(1, 10, waits=[receive])
    program, _ = maker.build()
    at = maker.index_of
    times = np.zeros((3, 5), np.int64)
    for op, row in {
        a: (2, 3, 10), send: (4, 11, 20), b: (30, 30, 40), receive: (1, 2, 20), c: (5, 21, 30)
    }.items():  # fmt: skip
        times[:, at[op]] = row
    line = measured_timeline(program, *times)
    found = {op: (REASONS[line.reason[at[op]]], int(line.cause[at[op]])) for op in (send, b, c)}
    assert found == {send: ("event", at[a]), b: ("host", -1), c: ("event", at[receive])}
    assert REASONS[line.reason[at[receive]]] == "peer"
    assert line.cause[at[receive]] == at[a]
    assert line.start_ns[at[receive]] == line.start_ns[at[send]] == 11


def measure(process: int, _world: int, folder: str) -> None:
    torch.set_num_threads(1)
    session = Session(torch.device("cpu"), timeout_s=30)
    cases = [make_case(f"n={n}", schedule="dualpipe", n=n, p2p="grouped") for n in (2, 1)]
    trainers = {case.name: Trainer(case.program, case.spec, session) for case in cases}
    times = time_steps(trainers, steps=3, warm_up=1)
    for name, trainer in trainers.items():
        assert len(times[name].step_ns) == 3
        assert 0 < times[name].median_ns < 60e9
        assert peak_memory(trainer) == (0, 0, 0)
        trace = trace_step(trainer, 0)
        assert (trace is None) == (process != 0)
        if trace is not None:
            write_trace(trace, Path(folder) / name)


def test_a_measured_trace_is_read_like_a_predicted_one(tmp_path: Path) -> None:
    """Every op has times, in the Program's order on every stream and across events."""
    launch(measure, 2, str(tmp_path), timeout_s=30)
    for n in (2, 1):
        program, line, source, meta = read_trace(tmp_path / f"n={n}")
        assert source == "measured"
        assert meta["plan_digest"] == program.meta["plan_digest"]
        assert (line.end_ns >= line.start_ns).all()
        ran = np.isin(program.kind, [i for i, k in enumerate(program.kinds) if k != "release"])
        assert (line.end_ns[ran] > 0).all()
        own = program.group < 0
        before = program.previous_on_stream
        chained = own & (before >= 0)
        assert (line.start_ns[chained] >= line.end_ns[before[chained]]).all()
        assert len(stage_blocks(program)) == 2


# -- CUDA streams, on a stand-in that notes the calls


class _Log(list[tuple[Any, ...]]):
    """Stands for torch.cuda: streams and events say what is done to them."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def Stream(self, _device: object, priority: int) -> SimpleNamespace:
        name, self.made = f"s{self.made}", self.made + 1
        stream = SimpleNamespace(name=name, priority=priority)
        stream.wait_event = lambda event: self.append((name, "waits for", event.name))
        stream.wait_stream = lambda other: self.append((name, "waits for", other.name))
        return stream

    def Event(self) -> SimpleNamespace:
        name, self.made = f"e{self.made}", self.made + 1
        record = lambda stream: self.append((name, "on", stream.name))  # noqa: E731
        return SimpleNamespace(name=name, record=record)

    def set_stream(self, stream: SimpleNamespace) -> None:
        self.append(("current", stream.name))

    def current_stream(self, _device: object) -> SimpleNamespace:
        return self.Stream(_device, 0)


def test_cuda_streams_wait_and_record_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    log = _Log()
    monkeypatch.setattr(streams_module.torch, "cuda", log)
    table = [Stream(0, "compute", 0), Stream(0, "high", -1), Stream(0, "pp", 0, 0)]
    streams = CudaStreams(table, 2, StreamPool(torch.device("cpu")))
    assert [s.priority for s in streams.streams] == [0, -1, 0]
    streams.begin()
    log.clear()
    streams.enter(0, ())
    streams.leave(0)
    streams.enter(1, (0,))
    streams.enter(1, ())
    streams.enter(2, (0,))
    work = SimpleNamespace(wait=lambda: log.append(("work waited on", log[-2][1])))
    streams.transferred([work])
    streams.leave(1)
    streams.enter(0, (1,))
    assert log == [
        ("e3", "on", "s0"),
        ("current", "s1"), ("s1", "waits for", "e3"),
        ("current", "s2"), ("s2", "waits for", "e3"), ("work waited on", "s2"),
        ("e4", "on", "s2"),
        ("current", "s0"), ("s0", "waits for", "e4"),
    ]  # fmt: skip


def test_too_many_streams_of_one_priority_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module.torch, "cuda", _Log())
    table = [Stream(0, f"flow{i}", 0, i) for i in range(33)]
    with pytest.raises(ValueError, match="torch has 32"):
        CudaStreams(table, 0, StreamPool(torch.device("cpu")))
    pool = StreamPool(torch.device("cpu"))
    for _ in range(32):
        pool.count_group(-1)
    with pytest.raises(ValueError, match="33 streams of priority -1"):
        pool.count_group(-1)


def test_no_program_runs_on_a_stream_of_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of the closed loop hung: their streams were those that NCCL ran on."""
    dealt = dict.fromkeys((0, -1), 0)

    class Torch:
        """Deals streams as torch does, to whoever asks."""

        Event = staticmethod(lambda: None)

        @staticmethod
        def Stream(_device: object, priority: int) -> tuple[int, int]:
            dealt[priority] += 1
            return priority, (dealt[priority] - 1) % streams_module.MAX_STREAMS_PER_PRIORITY

    monkeypatch.setattr(streams_module.torch, "cuda", Torch)
    pool = StreamPool(torch.device("cpu"))
    of_groups = {Torch.Stream(None, 0)}
    table = [Stream(0, "compute", 0), Stream(0, "high", -1)]
    table += [Stream(0, f"flow{i}", 0, i) for i in range(3)]
    ours = set[Any]()
    for row in range(20):
        if row % 4 == 0:  # groups of another schedule
            of_groups.add(Torch.Stream(None, 0))
            pool.count_group(0)
        streams = CudaStreams(table, 1, pool).streams
        assert len(set(streams)) == len(table)
        ours |= set(streams)
    assert not ours & of_groups


def test_capped_streams_keep_the_context_that_they_are_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the closed loop failed with "context is destroyed": nobody had it any more."""
    contexts: list[weakref.ref[Any]] = []

    class GreenContext:
        """Its streams do not keep it."""

        @classmethod
        def create(cls, **_options: object) -> GreenContext:
            context = cls()
            contexts.append(weakref.ref(context))
            return context

        def Stream(self) -> str:
            return "capped"

    module = SimpleNamespace(GreenContext=GreenContext)
    monkeypatch.setitem(sys.modules, "torch.cuda.green_contexts", module)
    monkeypatch.setattr(streams_module.torch, "cuda", _Log())
    table = [Stream(0, "compute", 0), Stream(0, "pp", 0, 0)]
    streams = CudaStreams(table, 0, StreamPool(torch.device("cpu")), compute_sms=112)
    gc.collect()
    assert streams.streams[0] == "capped"
    assert streams.streams[1] != "capped"
    assert contexts[0]() is not None
    del streams
    gc.collect()
    assert contexts[0]() is None


# -- groups


class _Opened:
    """Stands for NCCL: remembers what was opened, in what order on each process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, Call]] = []
        monkeypatch.setattr(groups_module, "open_call", self._open)
        monkeypatch.setattr(groups_module.dist, "new_group", lambda *_, **__: object())
        fake = SimpleNamespace(Options=lambda **_: SimpleNamespace(config=SimpleNamespace()))
        monkeypatch.setattr(groups_module.dist, "ProcessGroupNCCL", fake, raising=False)

    def _open(self, call: Call, handle: Handle, _device: object) -> None:
        assert (handle.group, call) not in self.calls
        self.calls.append((handle.group, call))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_every_call_of_a_step_was_made_before_it(
    order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an earlier Program has used the group in another way."""
    options: Any = {"pp": 4, "microbatches": 8}
    cases = [
        make_case("", schedule="1f1b", **options),
        make_case("", schedule="dualpipe", p2p="grouped", **options),
        make_case("", schedule="dualpipe", p2p="eager", **options),
    ]
    for process in range(4):
        opened = _Opened(monkeypatch)
        groups = Groups(StreamPool(torch.device("cuda")), 1.0)
        for number in order:
            program = cases[number].program
            own = groups.add(program, Place(process, 1, 1))
            for i in range(*program.rank_offsets[process : process + 2]):
                op = program[i]
                if op.group < 0 or op.peer < 0:
                    continue
                pair = (process, op.peer) if op.reads else (op.peer, process)
                kind = "send" if op.batch < 0 else "batch"
                assert any(
                    call.kind == kind and pair in call.pairs
                    for group, call in opened.calls if group is own[op.group].group
                ), (kind, pair)  # fmt: skip
