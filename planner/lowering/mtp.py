"""The multi-token-prediction head of DeepSeek-V3 (arXiv 2412.19437, section 2.2), depth 1.

It stands on the last stage, beside the output head: a norm of the trunk's last hidden vectors and
one of the embeddings of the next tokens, a projection of both from 2C to C, one transformer block
of the model's last kind, and the output head again; embedding and head are the trunk's own. Its
block has the residual of the other blocks: what goes in is copied to n rows, what comes out
collapses to one. It runs by itself, F behind the trunk's and I ahead of it, so no pair overlaps
its traffic; its W come with that of the output head.

The projection has the FLOPs and about the bytes of a SwiGLU of width 2C / 3 and is priced as one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhcplan.planner.lowering.chunks import Chunk
from mhcplan.planner.lowering.form import Key
from mhcplan.planner.lowering.work import StageShape
from mhcplan.planner.schedules.phase_orders import backward_layer, forward_layer
from mhcplan.sim.build import COMPUTE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mhcplan.planner.lowering.form import Form
    from mhcplan.sim.build import New, TemplateBuilder

_PREFIX, _OUTSIDE = "mtp.", "^"  # of names here, and of those that are the trunk's
_GRADIENT = f"{_PREFIX}dtrunk"  # of the trunk's last hidden vectors


def make_chunk(form: Form, shape: StageShape, builder: TemplateBuilder, slot: int) -> Chunk:
    """The chunk of a stage, with the head where the plan has one."""
    chunk = Chunk if form.mtp_moe is None or not shape.last else _TrunkEnd
    return chunk(form, shape, builder, slot)


class _TrunkEnd(Chunk):
    """The last stage's chunk with the head behind it."""

    branch_gradient = _GRADIENT

    def __init__(self, form: Form, shape: StageShape, builder: TemplateBuilder, slot: int) -> None:
        super().__init__(form, shape, builder, slot)
        trunk = self._kept.x(shape.num_sites) if self.plain else "z"
        self._head = _Head(form, shape.num_sites, trunk, builder, slot)

    def leave(self) -> None:
        super().leave()
        self._head.forward()

    def enter_backward(self) -> None:
        self._head.backward()
        super().enter_backward()

    def enter_weights(self) -> None:
        super().enter_weights()
        self._head.weights()


class _Head(Chunk):
    """The head as a chunk of one block, whose names all begin with ``mtp.``."""

    def __init__(
        self, form: Form, first_site: int, trunk: str, builder: TemplateBuilder, slot: int
    ) -> None:
        is_moe = form.mtp_moe is True
        super().__init__(form, StageShape((is_moe,), True, True, False, False), builder, slot)
        self._trunk, self._first_site = _OUTSIDE + trunk, first_site

    def forward(self) -> None:
        self._norm_forward("h", self._trunk)
        self._op("embedding", "F", COMPUTE, Key("embedding", "F"),
                 new=[self._hidden("next")])  # fmt: skip
        self._norm_forward("e", "next")
        made = self._state("x0") if self.plain else self._hidden("joined")
        self._op("mtp_project", "F", COMPUTE, self._project_key("F"), reads=["hn", "en"],
                 new=[made])  # fmt: skip
        if not self.plain:
            self._op("mhc_expand", "F", COMPUTE, Key("mhc_expand", "F"), category="mhc",
                     reads=["joined"], new=[self._state("x0")], dead=["joined"])  # fmt: skip
        forward_layer(self, 0)
        self.leave()

    def backward(self) -> None:
        self.enter_backward()
        self.recompute(0, of_ffn=True)
        backward_layer(self, 0, weights=False)
        self.leave_backward()
        self._op("mtp_project", "I", COMPUTE, self._project_key("I"), reads=[self._joined],
                 new=[self._hidden("dhn"), self._hidden("den")])  # fmt: skip
        self._norm_backward("h", self._trunk, self._hidden("dtrunk"))
        self._norm_backward("e", "next", self._hidden("dnext"), "next")

    def weights(self) -> None:
        self.enter_weights()
        self.ffn_weights(0)
        self.attention_weights(0)
        held = [self._joined, "hn", "en"]
        self._op("mtp_project", "W", COMPUTE, self._project_key("W"), reads=held, dead=held)
        key = Key("embedding", "W")
        self._op("embedding", "W", COMPUTE, key, reads=["dnext"], dead=["dnext"])

    @property
    def _joined(self) -> str:
        """Gradient of what the projection made."""
        return "g0" if self.plain else "de"

    @staticmethod
    def _project_key(pass_: str) -> Key:
        return Key("shared_experts", pass_, part="mtp_project")

    def _norm_forward(self, name: str, source: str) -> None:
        self._op("norm", "F", COMPUTE, Key("norm", "F"), name=f"norm.F.{name}",
                 reads=[source], new=[self._hidden(f"{name}n")])  # fmt: skip

    def _norm_backward(self, name: str, source: str, made: New, *dead: str) -> None:
        self._op("norm", "I", COMPUTE, Key("norm", "I"), name=f"norm.I.{name}",
                 reads=[f"d{name}n", source], new=[made], dead=[f"d{name}n", *dead])  # fmt: skip

    # -- names: those of the stage's blocks are taken

    def _op(
        self,
        kind: str,
        pass_: str,
        stream: int,
        key: object,
        *,
        category: str = "compute",
        site: int = -1,
        name: str = "",
        reads: Sequence[str] = (),
        new: Sequence[New] = (),
        dead: Sequence[str] = (),
        **transfer: int,
    ) -> None:
        super()._op(
            kind, pass_, stream, key, category=category,
            site=site + self._first_site if site >= 0 else site,
            name=_PREFIX + (name or f"{kind}.{pass_}{site}"),
            reads=[self._name(buffer) for buffer in reads],
            new=[made._replace(name=self._name(made.name)) for made in new],
            dead=[self._name(buffer) for buffer in dead], **transfer,
        )  # fmt: skip

    def _bury(self, *buffers: str) -> None:
        super()._bury(*map(self._name, buffers))

    def _name(self, buffer: str) -> str:
        return buffer.removeprefix(_OUTSIDE) if buffer[0] == _OUTSIDE else _PREFIX + buffer
