"""A corpus that is made on first use, once: of all processes that see its folder one makes it, the others wait.

They meet at a lock in a hidden folder beside it. Where hosts do not see each other's disks there is a lock on each, and
each makes its own. Whoever has waited in vain says so instead of trying in turn: what failed once would fail again.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from thinwire.errors import DataError, HeldError, StopAsked
from thinwire.locks import Lock, hold

_LOOK_S, _SETTLE_S = 0.2, 3.0
"""Between two looks; for a file server to show what another host has just written."""


def make_once(
    out: Path,
    make: Callable[[], object],
    *,
    there: Callable[[], bool],
    stopped: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Return when `there()`: made by this process through `make`, or by another that was waited for.

    `say` is told once for whom this process waits. Raises what `make` raises, StopAsked if `stopped()` meanwhile, and
    DataError if the one that was waited for ended without it, or no lock can be made beside `out`.
    """
    meeting, waited = out.with_name(f".{out.name}.first-use"), ""
    while not there():
        if stopped():
            raise _stopped(out)
        try:
            meeting.mkdir(parents=True, exist_ok=True)
            lock = hold(meeting)
        except HeldError as error:
            if not waited:  # later holders only look whether it is there
                waited = error.holder
                say(f"waiting for {waited}, which makes {out}")
            time.sleep(_LOOK_S)
            continue
        except FileNotFoundError:  # its holder is done, and has removed it
            continue
        except OSError as error:
            raise DataError(
                f"{out} cannot be made: {error.strerror or error}; choose another with --set data.path=PATH"
            ) from None
        with _held(lock, meeting):
            if not waited:
                _make(out, make, there, stopped)
                return
        if not _shows(out, there):
            raise DataError(f"{waited} has ended without making {out}; see what it said, and start again")


def _make(out: Path, make: Callable[[], object], there: Callable[[], bool], stopped: Callable[[], bool]) -> None:
    if there():
        return
    try:
        make()
    except Exception:
        if stopped():  # the signal has reached those that help too
            raise _stopped(out) from None
        raise


def _shows(out: Path, there: Callable[[], bool]) -> bool:
    """Whether it is there, once the file server has been asked anew."""
    end_s = time.monotonic() + _SETTLE_S
    while not there() and time.monotonic() < end_s:
        list(out.parent.iterdir())
        time.sleep(_LOOK_S)
    return there()


@contextmanager
def _held(lock: Lock, folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):  # another waits inside
            folder.rmdir()


def _stopped(out: Path) -> StopAsked:
    return StopAsked(f"stopped before {out} was made; the same command starts again")
