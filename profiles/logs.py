"""Logs of captures: one JSON object a line, written as it is measured.

Those that come with mhcplan are packed (``xz -9 FILE``): a tenth of their size.
"""

from __future__ import annotations

import json
import lzma
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.resources.abc import Traversable
    from pathlib import Path

Entry = dict[str, Any]


def read_log(log: Path | Traversable, stamp: Mapping[str, str] | None = None) -> list[Entry]:
    """Entries of a log that carry ``stamp`` (code, device); none where there is no file.

    A line that a kill cut short is dropped. A name that ends in ``.xz`` is a packed log.
    """
    if not log.is_file():
        return []
    data = log.read_bytes()
    text = (lzma.decompress(data) if log.name.endswith(".xz") else data).decode("utf-8")
    found: list[Entry] = []
    for line in text.splitlines():
        try:
            entry: Entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if stamp is None or stamp.items() <= entry.items():
            found.append(entry)
    return found
