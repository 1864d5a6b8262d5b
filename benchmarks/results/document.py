"""All sections of the results, and the document that keeps them."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from benchmarks.results import bubbles, plans, replay
from mhcplan.profiles.store import find_profile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from benchmarks.results.tables import Section
    from mhcplan.profiles.schema import Profile

SECTIONS: Mapping[str, Callable[[Profile], Section]] = MappingProxyType(
    {
        "replay": lambda _: replay.validation(),
        "replay-measures": replay.measures,
        "measures": plans.measures,
        "fields": plans.fields,
        "gpu-fields": plans.gpu_fields,
        "recompute": plans.recompute,
        "in-flight": plans.in_flight,
        "rows": plans.state_rows,
        "bubbles": lambda _: bubbles.bubbles(),
        "latency": lambda _: bubbles.latency(),
    }
)

_HEAD = """\
# What the model says

Predicted figures, written by `python -m benchmarks.results --write` with profile {name}
(digest {digest}). Nothing here was measured but the kernel and network times that the profile
holds; `sources` says how much of the op time of a row is measured (m), interpolated (i),
extrapolated (e) and assumed (a), in percent.
"""


def section(name: str, profile: str) -> str:
    """One section as Markdown."""
    return SECTIONS[name](find_profile(profile)).markdown(name)


def text(profile: str) -> str:
    """The whole document."""
    found = find_profile(profile)
    head = _HEAD.format(name=found.name, digest=found.digest)
    return "\n".join([head, *(section(name, profile) for name in SECTIONS)])
