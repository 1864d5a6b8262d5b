"""Gradient reduction and weight gather of a stage: ZeRO-1 over the processes that hold it.

Both are in place: every process reduces into its own share of the flat gradient, and gathers from
its own share of the flat weights. gloo has neither form, so a CPU reduces all and gathers a copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from mhcplan.runtime.groups import ALL_GATHER, REDUCE_SCATTER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mhcplan.runtime.groups import Handle
    from mhcplan.runtime.parameters import Section, StageParameters


class StageReduction:
    """The once-a-step collectives of a stage's parameters."""

    def __init__(
        self, parameters: StageParameters, groups: Mapping[int, tuple[str, Handle]]
    ) -> None:
        """``groups``: for the Program's groups of this rank, (part, process group)."""
        self._parameters, self._groups = parameters, groups

    def reduce(self, group: int) -> list[Any]:
        """Sum the gradients of a part over its holders; this process needs only its share."""
        part, handle = self._groups[group]
        return [_reduce(s, handle.group) for s in self._parameters.sections[part]]

    def gather(self, group: int) -> list[Any]:
        """Collect every holder's share of the updated weights."""
        part, handle = self._groups[group]
        return [_gather(s, handle.group) for s in self._parameters.sections[part]]


def _reduce(section: Section, group: Any) -> Any:  # noqa: ANN401 - process groups and works
    if not section.grad.is_cuda:
        return dist.all_reduce(section.grad, group=group, async_op=True)
    own = section.own_of(section.grad)
    return REDUCE_SCATTER(own, section.grad, group=group, async_op=True)


def _gather(section: Section, group: Any) -> Any:  # noqa: ANN401
    own = section.own_of(section.data)
    if not own.is_cuda:
        own = own.clone()
    return ALL_GATHER(section.data, own, group=group, async_op=True)
