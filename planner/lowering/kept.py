"""What a chunk keeps from F to its backward, and under which name the backward finds it.

Names are those of :mod:`mhcplan.planner.lowering.chunks`. What mHC's recompute blocks or the
sublayers' own recompute rebuild is not kept, and carries an r in its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhcplan.profiles.specs import SITES_PER_BLOCK
from mhcplan.sim.build import GRAD_OUT, OUT

if TYPE_CHECKING:
    from mhcplan.planner.lowering.form import Form
    from mhcplan.planner.lowering.work import StageShape


class Kept:
    """Of a stage's chunk; j is a site of the stage.

    Attributes:
        rebuilds_states: states and what sublayers read are rebuilt by recompute blocks.
    """

    def __init__(self, form: Form, shape: StageShape) -> None:
        self._form, self._shape = form, shape
        self._plain = form.is_plain
        self.rebuilds_states = not self._plain and form.recompute_block is not None

    def recompute_blocks(self) -> list[range]:
        """Sites of each recompute block of the stage; the last may be shorter."""
        size, sites = self._form.recompute_block, self._shape.num_sites
        if self._plain or size is None:
            return []
        return [range(start, min(start + size, sites)) for start in range(0, sites, size)]

    def runs_again(self, j: int) -> bool:
        """Whether the sublayer keeps nothing and runs again before its backward."""
        is_attention = j % SITES_PER_BLOCK == 0
        layers = self._form.recompute_layers
        return layers == "full" or (layers == "selective" and is_attention)

    def x(self, j: int) -> str:
        """The state before site j."""
        return OUT if j == self._shape.num_sites and not self._shape.last else f"x{j}"

    def x_again(self, j: int) -> str:
        """The state before site j as the backward finds it."""
        stored = {sites.start for sites in self.recompute_blocks()}
        return self.x(j) if not self.rebuilds_states or j in stored else f"xr{j}"

    def g(self, j: int) -> str:
        """Its gradient."""
        return GRAD_OUT if j == 0 and not self._shape.first else f"g{j}"

    def u(self, j: int) -> str:
        """H_pre x as the backward finds it."""
        return f"ur{j}" if self.rebuilds_states else f"u{j}"

    def h(self, j: int) -> str:
        """What the sublayer read, as the backward finds it."""
        return f"hr{j}" if self.rebuilds_states or self.runs_again(j) else f"h{j}"

    def source(self, j: int, *, again: bool) -> str:
        """What the sublayer reads when it runs first, or again."""
        return self.h(j) if again else f"h{j}"

    def dead_source(self, j: int, *, again: bool) -> list[str]:
        """That, where it is dead after the sublayer: it will be rebuilt."""
        return [f"h{j}"] if not again and self.h(j) != f"h{j}" else []

    def left(self, name: str, j: int) -> str:
        """What F left for I and W under ``name``, as the backward finds it."""
        return f"{name}r{j}" if self.runs_again(j) else f"{name}{j}"

    def rows(self, j: int) -> str:
        """Input of the experts, as their W finds it."""
        return self.left("rows" if self._form.exchanges else "sent", j)

    def dead_if_rebuilt(self, name: str) -> list[str]:
        """A buffer that is dead where states are rebuilt."""
        return [name] if self.rebuilds_states else []

    def dead_if_again(self, name: str, j: int) -> list[str]:
        """A buffer that is dead after F where the sublayer runs again."""
        return [name] if self.runs_again(j) else []

    def arrived(self, j: int) -> list[str]:
        """What recompute for site j waits for where it may not run ahead: the gradient above it."""
        arrives = j + 1 < self._shape.num_sites or not self._shape.last
        return [] if self._form.overlap_recompute or not arrives else [self.g(j + 1)]
