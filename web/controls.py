"""What the page lets one change: a control for each daily question, a list for all other fields.

Names, choices, defaults and descriptions are those of :class:`PlanSpec`; only which values a slider
stops at is chosen here. Any other value can be typed beside it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel

from mhcplan.planner.export.formats import LOSSES
from mhcplan.planner.plan.file import FLAG_FIELDS
from mhcplan.planner.plan.spec import PlanSpec
from mhcplan.profiles.presets import MODELS
from mhcplan.web.whatif import DEFAULT_MODEL

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pydantic.fields import FieldInfo

_POWERS = tuple(2**power for power in range(17))
LABELS = {
    "model": "model",
    "n": "n, expansion rate",
    "recompute_block": "recompute block L_r, sites",
    "residual": "residual",
    "pp": "pipeline ranks, pp",
    "ep": "expert ranks, ep",
    "dp": "data ranks, dp",
    "microbatches": "microbatches, M",
    "micro_batch_size": "sequences in a microbatch",
    "seq_len": "tokens in a sequence",
    "schedule": "schedule",
    "priority": "high-priority stream",
    "profile": "profile",
}
_STOPS: dict[str, tuple[int | str, ...]] = {
    "n": (1, 2, 4, 8, 16),
    "recompute_block": ("auto", "none", *range(1, 17), 20, 24, 30, 40, 60, "stage"),
    "pp": (1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 30, 32, 40, 48, 60, 64),
    "ep": (1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 36, 64, 72, 128, 256),
    "dp": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512),
    "microbatches": (*range(2, 32, 2), *range(32, 64, 4), *range(64, 129, 8), 160, 192, 256),
    "micro_batch_size": _POWERS[:7],
    "seq_len": tuple(1024 * power for power in _POWERS[:8]),
}


@dataclass(frozen=True)
class Control:
    """An input of the page.

    Attributes:
        name: in the query.
        path: the plan's field, as errors and ``--set`` name it.
        kind: a slider beside an input, a picker, or an input alone.
        values: where a slider stops, what a picker offers, what is known of a field.
    """

    name: str
    path: str
    label: str
    help: str
    kind: Literal["slider", "picker", "text"]
    values: tuple[str, ...]
    default: str


def controls(profiles: Sequence[str]) -> dict[str, Any]:
    """All inputs as JSON: ``main`` in their order, ``more`` for any other field; and downloads."""
    paths = {"model": "model", **FLAG_FIELDS}
    fields = dict(_fields(PlanSpec))
    offered = {"model": tuple(MODELS), "profile": tuple(profiles)}
    main = [
        _control(name, paths[name], fields[paths[name]], label, offered.get(name))
        for name, label in LABELS.items()
    ]
    shown = {control.path for control in main}
    more = [
        _control(path, path, field, path, None)
        for path, field in fields.items()
        if path not in shown
    ]
    return {
        "main": [asdict(control) for control in main],
        "more": [asdict(control) for control in more],
        "exports": {name: list(losses) for name, losses in LOSSES.items()},
    }


def _control(
    name: str, path: str, field: FieldInfo, label: str, offered: tuple[str, ...] | None
) -> Control:
    values = offered or tuple(str(value) for value in _STOPS.get(name, ()))
    kind = "slider" if values and not offered else "picker"
    values = values or tuple(dict.fromkeys(_choices(field.annotation)))
    default = DEFAULT_MODEL if path == "model" else _word(field.default)
    return Control(
        name, path, label, field.description or "", kind if values else "text", values, default
    )


def _fields(spec: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Fields by dotted path; the model is one field, whose sizes are not for sliders."""
    for name, field in spec.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and name != "model":
            yield from _fields(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _choices(annotation: object) -> Iterator[str]:
    """The words that a field takes, if it takes words."""
    if annotation is bool:
        yield from ("true", "false")
    elif get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    else:
        for inner in get_args(annotation):
            yield from _choices(inner)


def _word(value: object) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
