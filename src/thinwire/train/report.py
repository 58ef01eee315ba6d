"""Failure reports: what a rank leaves when it fails, and which of several reports is the root cause. No torch here."""

import json
import signal
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from thinwire.errors import LinkError, RankLost, ThinwireError


@dataclass(frozen=True)
class FailureReport:
    """One rank's end. `sentence` is for people; `details` is the traceback of an error that is not a known one."""

    rank: int
    time_s: float
    sentence: str
    details: str
    exit_status: int
    needed_bytes: int = field(default=0, kw_only=True)
    """Of a rank that ran out of memory: what it needed at least."""
    capacity_bytes: int = field(default=0, kw_only=True)
    """And what there is."""
    cascade: bool
    """True if this is the echo of another rank's failure."""
    names_a_rank: bool = False
    """True if the sentence says itself which rank it is about."""

    def write(self, path: Path) -> None:
        """Whole or not at all: the launcher may read it when this process is killed, or the disk is full."""
        partial = path.with_suffix(".partial")
        with suppress(OSError):
            partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
            partial.replace(path)


def describe(rank: int, error: BaseException) -> FailureReport:
    """The report of an exception. Known errors need no traceback; anything else is shown whole."""
    known = isinstance(error, ThinwireError)
    text = str(error) or type(error).__name__
    return FailureReport(
        rank=rank,
        time_s=time.time(),
        sentence=text if known else f"{type(error).__name__}: {text.splitlines()[0]}",
        details="" if known else "".join(traceback.format_exception(error)),
        needed_bytes=getattr(error, "needed_bytes", 0),
        capacity_bytes=getattr(error, "capacity_bytes", 0),
        exit_status=error.exit_status if isinstance(error, ThinwireError) else 1,
        cascade=isinstance(error, RankLost),
        names_a_rank=isinstance(error, LinkError),
    )


def root_cause(reports: Path, died: Mapping[int, int], logs: Path) -> FailureReport:
    """Of all that is known, what came first: a rank ended by a signal, then the earliest failure that is no echo.

    `died` maps ranks to the signal that ended them.
    """
    for rank, number in sorted(died.items()):
        name = signal.Signals(number).name
        hint = "; the system may have run out of memory (see dmesg)" if number == signal.SIGKILL else ""
        return FailureReport(rank, time.time(), f"was ended by {name}{hint}", "", 1, False)
    found = [FailureReport(**json.loads(path.read_text(encoding="utf-8"))) for path in reports.glob("*.json")]
    if not found:
        return FailureReport(-1, time.time(), f"a rank left without saying why; see {logs}", "", 1, False)
    return min(found, key=lambda report: (report.cascade, report.time_s))
