"""Show what a file gains, as `tail -f` does, without waiting."""

from pathlib import Path
from typing import IO


class Follow:
    """Copies what was appended to `path` since the last look to `out`."""

    def __init__(self, path: Path, out: IO[bytes]) -> None:
        self._path, self._out, self._offset = path, out, 0

    def look(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        if new:
            self._offset += len(new)
            self._out.write(new)
            self._out.flush()
