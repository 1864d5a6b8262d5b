"""Reads a recording of a training run (``mhcplan.recording``); numpy alone, no torch.

The file describes itself: a line of JSON with numpy's description of a record, then records with a
checksum each (:mod:`mhcplan.kernels.diagnostics_file` writes them). A file that ends in the middle
of a record is read up to its last whole one.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pathlib import Path

FORMAT, FORMAT_VERSION = "mhcplan.recording", 1
_CRC_BYTES = 4

Floats = NDArray[np.float64]


class RecordingError(ValueError):
    """A file that is no recording, or one without a whole record; one line."""


@dataclass(frozen=True)
class Recording:
    """What a model's residual did in a run.

    Attributes:
        name: the file's, without its ending.
        about: what was recorded: ``kind``, ``expansion_rate``, ``sites``, ``every``, and more.
        records: numpy records in order; see ``kernels/diagnostics_maps.py`` for their figures.
        cut_bytes: bytes behind the last whole record, which are not read.
    """

    name: str
    about: dict[str, Any]
    records: NDArray[np.void]
    cut_bytes: int = 0

    @property
    def kind(self) -> str:
        """Kind of the residual."""
        return str(self.about["kind"])

    @property
    def sites(self) -> list[str]:
        """Names of the sites in depth order."""
        return list(self.about["sites"])

    @property
    def is_checkpoint(self) -> bool:
        """Whether it shows a checkpoint on probe states: no loss, no gradients, no text."""
        return "probe" in self.about

    @property
    def steps(self) -> NDArray[np.int64]:
        """Step of each record."""
        return self.records["step"]

    def figure(self, name: str) -> Floats:
        """A figure of every record, ``[records, ...]``."""
        return self.records[name]

    def last(self, name: str) -> Floats:
        """A figure of the last record."""
        return self.records[name][-1]

    def curve(self, name: str) -> tuple[NDArray[np.int64], Floats]:
        """Every step, and its ``loss`` or ``gradient_norm``; NaN where that is not known."""
        values: Floats = self.records[name]
        every = values.shape[1]
        before = np.arange(1 - every, 1, dtype=np.int64)
        return np.add.outer(self.steps, before).ravel(), values.ravel()


def is_recording(path: Path) -> bool:
    """Whether a file starts as a recording does.

    Raises:
        RecordingError: it cannot be read.
    """
    start = json.dumps({"format": FORMAT})[:-1].encode()
    try:
        with path.open("rb") as file:
            return file.read(len(start)) == start
    except OSError as error:
        raise RecordingError(f"{path}: {error.strerror or error}") from None


def read_recording(path: Path) -> Recording:
    """Read a recording.

    Raises:
        RecordingError: the file cannot be read, is another format or a newer version, or has no
            whole record.
    """
    if not is_recording(path):
        raise RecordingError(f"{path}: is no recording ({FORMAT})")
    line, newline, data = path.read_bytes().partition(b"\n")
    if not newline:
        raise RecordingError(f"{path}: was cut off before its first record")
    try:
        header = cast("dict[str, Any]", json.loads(line))
        version = header["format_version"]
        if version != FORMAT_VERSION:
            raise RecordingError(
                f"{path}: {FORMAT} version {version}; this version reads {FORMAT_VERSION}"
            )
        dtype = np.dtype([(name, kind, tuple(shape)) for name, kind, shape in header["dtype"]])
        about = dict(header["about"])
        _ = about["kind"], about["sites"], about["expansion_rate"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise RecordingError(f"{path}: its first line does not describe it ({error})") from None
    whole = _whole_records(data, dtype.itemsize)
    if not whole:
        raise RecordingError(f"{path}: has no whole record")
    records = np.frombuffer(b"".join(whole), dtype)
    cut = len(data) - len(whole) * (dtype.itemsize + _CRC_BYTES)
    return Recording(path.stem, about, records, cut)


def _whole_records(data: bytes, size: int) -> list[bytes]:
    """Records up to the first that is cut off or whose checksum is wrong."""
    found: list[bytes] = []
    for start in range(0, len(data) - size - _CRC_BYTES + 1, size + _CRC_BYTES):
        record = data[start : start + size]
        crc = data[start + size : start + size + _CRC_BYTES]
        if zlib.crc32(record) != int.from_bytes(crc, "little"):
            break
        found.append(record)
    return found
