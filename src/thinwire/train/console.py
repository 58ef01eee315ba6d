"""Standard output and error that may go away: `| head`, a full disk, a terminal that was closed. No torch.

A run tells its story in `events.jsonl`; what it prints is a copy for whoever looks. So a write that the system refuses
turns that stream into one that takes everything and keeps nothing, and the process goes on. A stream that was closed
before the process began is opened on nothing, lest the next file that is opened becomes the standard output of children.
"""

import errno
import io
import os
import sys
from typing import Any


class Forgiving(io.RawIOBase):
    """The file descriptor `descriptor`, to write to until the system refuses; then nothing, and `refused` says why."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.refused: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any, /) -> int:
        if self.refused is None:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:
                raise
            except OSError as error:
                self.refused = error
        return len(data)


def forgive() -> None:
    """Make `sys.stdout` and `sys.stderr` of this process forgiving, unless something else than files stands in for them."""
    for descriptor, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            _open_nothing(descriptor)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        now = getattr(sys, name)
        if now is None or (type(now) is io.TextIOWrapper and now is getattr(sys, f"__{name}__")):
            setattr(sys, name, _text(descriptor, "utf-8" if now is None else now.encoding))


def refused() -> OSError | None:
    """Why standard output took not all of it; None if it took all, or its reader left early, who wants no more."""
    try:
        sys.stdout.flush()
    except ValueError:  # closed by who captures it
        return None
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.refused if isinstance(raw, Forgiving) else None
    return None if error is None or error.errno == errno.EPIPE else error


def _text(descriptor: int, encoding: str) -> io.TextIOWrapper:
    """Line by line; names that are no UTF-8 go out as the bytes that they are, signs that an encoding lacks spelled out."""
    errors = "surrogateescape" if encoding.lower() in ("utf-8", "utf8") else "backslashreplace"
    buffer = io.BufferedWriter(Forgiving(descriptor))
    return io.TextIOWrapper(buffer, encoding=encoding, errors=errors, line_buffering=True)


def _open_nothing(descriptor: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing != descriptor:
        os.dup2(nothing, descriptor)
        os.close(nothing)
    os.set_inheritable(descriptor, True)
