"""What is at the path of a file to be written: a file or nothing, a device or a stream, or what is refused."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}
_STREAMS = (1, 2)  # what this process prints to; /dev/stdout may be a pipe, or a file that has begun


def device_at(path: Path) -> int | None:
    """A descriptor, open for writing, of the device or the stream that ``path`` names; None: it names a file, or none.

    Raises OSError for anything else: a pipe without a reader would block.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    for stream in _STREAMS:
        with suppress(OSError):  # it is closed
            if os.path.samestat(found, os.fstat(stream)):
                return os.dup(stream)
    if stat.S_ISCHR(found.st_mode):
        return os.open(path, os.O_WRONLY | os.O_NOCTTY)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(None, f"it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'no file')}")
    return None
