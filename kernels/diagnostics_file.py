"""A recording: one line of JSON, then records of a fixed size, each with a checksum.

    {"format": "mhcplan.recording", "format_version": 1, "about": {...}, "dtype": [...]}\\n
    record, crc32 of the record (little-endian uint32)
    record, crc32
    ...

``dtype`` is numpy's description of a record (``numpy.dtype(...).descr``), so that numpy alone reads
a recording. Records are appended in one write each and never touched again: whatever ends the
writer, the file is readable up to its last whole record.
"""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FORMAT, FORMAT_VERSION = "mhcplan.recording", 1
_CRC_BYTES = 4


def record_dtype(every: int, shapes: Mapping[str, tuple[int, ...]]) -> np.dtype[Any]:
    """Of a record: its step, the losses and gradient norms of the ``every`` steps that end with
    it, and figures of the given shapes.
    """
    curve = [("loss", "<f8", (every,)), ("gradient_norm", "<f8", (every,))]
    sites = [(name, "<f8", shape) for name, shape in shapes.items()]
    return np.dtype([("step", "<i8"), ("elapsed_s", "<f8"), *curve, *sites])


class RecordingError(ValueError):
    """A recording that cannot be written or continued; one line."""


class RecordingWriter:
    """Appends records to a file.

    Args:
        path: the file; its folder is made.
        about: what was recorded, as JSON: names and numbers.
        dtype: of :func:`record_dtype`.
        keep_until: None starts anew; a step continues the recording that is there, without the
            records after that step and without one that was cut off.

    Raises:
        RecordingError: the file to be continued is another recording.
    """

    def __init__(
        self,
        path: Path,
        about: Mapping[str, Any],
        dtype: np.dtype[Any],
        *,
        keep_until: int | None = None,
    ) -> None:
        self.dtype = dtype
        description = [[name, kind, list(shape)] for name, kind, shape in _fields(dtype)]
        header = {"format": FORMAT, "format_version": FORMAT_VERSION, "about": dict(about),
                  "dtype": description}  # fmt: skip
        line = json.dumps(header).encode() + b"\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        if keep_until is None or not path.exists():
            # unbuffered: a record is in the system's hands, or not begun
            self._file = path.open("wb", buffering=0)
            self._file.write(line)
            return
        self._file = path.open("r+b", buffering=0)
        if self._file.read(len(line)) != line:
            self._file.close()
            raise RecordingError(f"{path}: is not a recording of this run, so it is not continued")
        self._file.seek(len(line) + self._whole(self._file.read(), keep_until))
        self._file.truncate()

    def _whole(self, data: bytes, until: int) -> int:
        """Bytes of the records, from the first on, that are whole and not after step ``until``."""
        size = self.dtype.itemsize + _CRC_BYTES
        end = 0
        while end + size <= len(data):
            record = data[end : end + self.dtype.itemsize]
            crc = int.from_bytes(data[end + self.dtype.itemsize : end + size], "little")
            if zlib.crc32(record) != crc or np.frombuffer(record, self.dtype)["step"][0] > until:
                break
            end += size
        return end

    def write(self, step: int, elapsed_s: float, values: np.ndarray) -> None:
        """Append one record; ``values`` are those of all fields behind the first two, flat."""
        record = np.zeros(1, self.dtype)
        record["step"], record["elapsed_s"] = step, elapsed_s
        start = 0
        for name, _, shape in _fields(self.dtype)[2:]:
            end = start + int(np.prod(shape))
            record[name] = values[start:end].reshape(shape)
            start = end
        data = record.tobytes()
        self._file.write(data + zlib.crc32(data).to_bytes(_CRC_BYTES, "little"))

    def close(self) -> None:
        """Close the file; nothing is pending."""
        self._file.close()


def _fields(dtype: np.dtype[Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    assert dtype.names is not None
    return [(name, dtype[name].base.str, dtype[name].shape) for name in dtype.names]
