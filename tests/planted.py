"""A pickle that leaves a mark when it is executed."""

import os
from pathlib import Path
from typing import Any


class Bomb:
    """Unpickled, it makes the folder `mark`."""

    def __init__(self, mark: Path) -> None:
        self._mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._mark,)


def bomb_went_off(mark: Path) -> bool:
    return mark.is_dir()
