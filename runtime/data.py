"""Real tokens for training runs: Python's own language reference, which ships with every Python.

``pydoc_data.topics`` is about 0.7 MB of English and code (a Python that was packed without it has
its library's sources instead). Its pieces (words with the blank before them, numbers, signs) are
numbered by how often they occur; a piece beyond the vocabulary is spelled in bytes. Small, fixed
and real enough for a loss that falls.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections import Counter
from functools import lru_cache
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

_BYTES = 256
_PIECE = re.compile(r" ?[A-Za-z_]+|\d+| +|\n+|[^\sA-Za-z_\d]")


def corpus() -> str:
    """The text, topic by topic in alphabetical order."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        return "\n\n".join(path.read_text(encoding="utf-8", errors="replace") for path in sources)
    return "\n\n".join(topics[name] for name in sorted(topics))


@lru_cache(maxsize=4)
def tokens_of_corpus(vocab_size: int) -> Tensor:
    """The corpus as token numbers [length]; see :func:`tokens_of`."""
    return tokens_of(corpus(), vocab_size)


def tokens_of(text: str, vocab_size: int) -> Tensor:
    """A text as token numbers [length], int64.

    Args:
        text: anything.
        vocab_size: numbers below 256 are bytes, the others pieces, most frequent first.

    Raises:
        ValueError: the vocabulary has no room for all bytes.
    """
    if vocab_size < _BYTES:
        raise ValueError(f"vocab_size={vocab_size} must be at least {_BYTES}, one for every byte")
    pieces = _PIECE.findall(text)
    common = Counter(pieces).most_common(vocab_size - _BYTES)
    number = {piece: (_BYTES + i,) for i, (piece, _) in enumerate(common)}
    spelled = (number.get(piece) or tuple(piece.encode()) for piece in pieces)
    return torch.tensor(list(chain.from_iterable(spelled)), dtype=torch.int64)


class TextBatches:
    """Inputs and targets of every microbatch, the same for equal (seed, step, number)."""

    def __init__(
        self, vocab_size: int, tokens: int, seq_len: int, seed: int = 0, text: Tensor | None = None
    ) -> None:
        """Sequences of ``seq_len``, ``tokens`` of them in a microbatch; see the module.

        ``text``: token numbers [length] in place of the corpus.
        """
        self.text = tokens_of_corpus(vocab_size) if text is None else text
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        while len(self.text) <= seq_len + 1:
            self.text = self.text.repeat(2)

    def microbatch(self, step: int, number: int) -> tuple[Tensor, Tensor]:
        """Token numbers [T] and those that follow them [T], on the CPU.

        Args:
            step: training step.
            number: the microbatch, counted over all replicas: replica x M + microbatch.
        """
        starts = [self._start(step, number, i) for i in range(self.tokens // self.seq_len)]
        rows = torch.stack([self.text[s : s + self.seq_len + 1] for s in starts])
        return rows[:, :-1].reshape(-1), rows[:, 1:].reshape(-1)

    def _start(self, step: int, number: int, sequence: int) -> int:
        key = f"{self.seed}/{step}/{number}/{sequence}".encode()
        draw = int.from_bytes(hashlib.sha256(key).digest()[:8])
        return draw % (len(self.text) - self.seq_len - 1)


class Batches:
    """Inputs, targets and losses of a step's microbatches, on the device. [M, T], [M, T], [M]."""

    def __init__(self, microbatches: int, tokens: int, device: torch.device) -> None:
        """Buffers that every step overwrites."""
        self.inputs = torch.zeros(microbatches, tokens, dtype=torch.int64, device=device)
        self.targets = torch.zeros_like(self.inputs)
        self.losses = torch.zeros(microbatches, device=device)
