"""What a rank does, action after action, in the letters of ``torch.distributed.pipelining``.

====================== ================================================================
``2F0``                F: forward of stage 2 for microbatch 0
``2I0``                I: gradient of that chunk's input
``2W0``                W: gradients of that chunk's weights
``2B0``                B: full backward, I then W in one go
``(0F3;3B1)OVERLAP_F_B`` F of one chunk beside B of another, overlapped
====================== ================================================================

The zero-bubble papers write B for our I and BW for our B; DeepSeek's B is ours. Other alphabets are
translated where they enter or leave, never in here.

``stage`` counts the model's stages in depth order and ``microbatch`` all microbatches of a step,
whichever direction they travel; so (stage, microbatch) names one chunk in every schedule, also in
DualPipe, where a stage lives on two ranks.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, cast

Kind = Literal["F", "I", "W", "B", "OVERLAP"]
MessageKind = Literal["SEND_F", "RECV_F", "SEND_B", "RECV_B"]

_NUMBER = "(0|[1-9][0-9]*)"
_SINGLE = re.compile(f"{_NUMBER}([FIWB]){_NUMBER}")
_PAIR = re.compile(r"\(([^();]*);([^();]*)\)OVERLAP_F_B")


class Action(NamedTuple):
    """One cell of a rank's row.

    Attributes:
        kind: F, I, W, B or OVERLAP.
        stage: Stage of the chunk; of an OVERLAP, that of its forward.
        microbatch: Microbatch of the chunk; of an OVERLAP, that of its forward.
        backward: The B that runs beside the forward; None unless ``kind`` is OVERLAP.
    """

    kind: Kind
    stage: int
    microbatch: int
    backward: Action | None = None

    @classmethod
    def overlap(cls, forward: Action, backward: Action) -> Action:
        """The overlapped pair of an F and a B."""
        return cls("OVERLAP", forward.stage, forward.microbatch, backward)

    @property
    def parts(self) -> tuple[Action, ...]:
        """The F, I, W and B in this action: itself, or the F and the B of a pair, in this order."""
        if self.backward is None:
            return (self,)
        return Action("F", self.stage, self.microbatch), self.backward

    def __str__(self) -> str:
        """The action as torch writes it."""
        if self.backward is None:
            return f"{self.stage}{self.kind}{self.microbatch}"
        forward, backward = self.parts
        return f"({forward};{backward})OVERLAP_F_B"


class Message(NamedTuple):
    """One end of a transfer between two ranks: an activation (F) or its gradient (B).

    Attributes:
        kind: SEND_F, RECV_F, SEND_B or RECV_B.
        stage: Stage on this end, so ``0SEND_F3`` meets ``1RECV_F3`` and ``1SEND_B3`` ``0RECV_B3``.
        microbatch: Microbatch that the tensor belongs to.
        peer: Rank of the other end.
    """

    kind: MessageKind
    stage: int
    microbatch: int
    peer: int

    @property
    def carries(self) -> Output:
        """What is sent: the same on both ends."""
        if self.kind in {"SEND_F", "RECV_F"}:
            return Output("F", self.stage - (self.kind == "RECV_F"), self.microbatch)
        return Output("B", self.stage + (self.kind == "RECV_B"), self.microbatch)

    def __str__(self) -> str:
        """The message as torch writes it; the peer follows from the stage and is not printed."""
        return f"{self.stage}{self.kind}{self.microbatch}"


class Output(NamedTuple):
    """What a chunk hands to the next: F its activation, to a deeper stage, B its input gradient."""

    of: Literal["F", "B"]
    stage: int
    microbatch: int


def output_of(part: Action) -> Output | None:
    """What an F, I or B hands on; a W hands on nothing."""
    if part.kind == "W":
        return None
    return Output("F" if part.kind == "F" else "B", part.stage, part.microbatch)


def input_of(part: Action, num_stages: int) -> Output | None:
    """What an F, I, W or B needs before it can run; the first stage's F needs nothing.

    The last stage's backward starts from its own forward, where the loss is, and a W from its I.
    """
    kind, stage, microbatch, _ = part
    if kind == "F":
        return Output("F", stage - 1, microbatch) if stage > 0 else None
    if kind == "W":
        return Output("B", stage, microbatch)
    if stage == num_stages - 1:
        return Output("F", stage, microbatch)
    return Output("B", stage + 1, microbatch)


def parse_action(text: str) -> Action:
    """Reads one action; the inverse of ``str(action)``, and nothing else is accepted.

    Raises:
        ValueError: ``text`` is not exactly one action (torch's own parser takes ``0F10garbage``).
    """
    if match := _SINGLE.fullmatch(text):
        stage, kind, microbatch = match.groups()
        return Action(cast("Kind", kind), int(stage), int(microbatch))
    if match := _PAIR.fullmatch(text):
        forward, backward = map(parse_action, match.groups())
        if (forward.kind, backward.kind) == ("F", "B"):
            return Action.overlap(forward, backward)
    raise ValueError(f"action={text!r} must look like 2F0, 2I0, 2W0, 2B0 or (0F3;3B1)OVERLAP_F_B")
