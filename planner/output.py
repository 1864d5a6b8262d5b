"""Files that appear whole or not at all.

Every file is written beside its place under a name of its own and moved there when all of them are
complete; a full disk or Ctrl-C leaves what was there before.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_MODE = 0o644


class OutputError(Exception):
    """A file or folder that cannot be written; the message is one line."""


def write_file(path: Path, content: str | bytes, *, replace: bool = True) -> None:
    """Write one file, its folder too if need be; a pipe or a device is written into.

    Raises:
        OutputError: the file exists and ``replace`` is False, or it cannot be written.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        _write_into(path, content)  # moved to /dev/stdout, a file would take its place
        return
    if not replace and path.exists():
        raise OutputError(f"{path}: exists already; choose another name or give --force")
    write_files(path.parent, {path.name: content})


def write_files(folder: Path, contents: Mapping[str, str | bytes]) -> None:
    """Write all of ``contents`` (text or bytes by file name) into ``folder``, or none.

    Raises:
        OutputError: the folder cannot be made, or a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as cleanup:
            staged = {name: _stage(folder, text, cleanup) for name, text in contents.items()}
            for name, file in staged.items():
                file.replace(folder / name)
    except FileExistsError:
        raise OutputError(f"{folder}: is not a folder") from None
    except OSError as error:
        # the first name of an error may be one of our own making
        raise OutputError(f"{error.filename2 or folder}: {error.strerror}") from None


def _write_into(device: Path, content: str | bytes) -> None:
    try:
        device.write_bytes(_bytes(content))
    except OSError as error:
        raise OutputError(f"{device}: {error.strerror}") from None


def _stage(folder: Path, content: str | bytes, cleanup: ExitStack) -> Path:
    handle, name = tempfile.mkstemp(prefix=".mhcplan-", dir=folder)
    file = Path(name)
    cleanup.callback(file.unlink, missing_ok=True)
    with os.fdopen(handle, "wb") as stream:
        stream.write(_bytes(content))
        os.fchmod(stream.fileno(), _MODE)
    return file


def _bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content
