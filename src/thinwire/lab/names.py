"""A lab's name: a prefix, and which process owns it, so that what is left over can be told from what is in use."""

import os
import secrets
from pathlib import Path

PREFIX = "thinwire-lab-"


def new_name() -> str:
    """A name for a lab of this process: `thinwire-lab-PID-START-RANDOM`."""
    return f"{PREFIX}{os.getpid()}-{start_ticks(os.getpid())}-{secrets.token_hex(3)}"


def is_name(text: str) -> bool:
    parts = text.removeprefix(PREFIX).split("-")
    return text.startswith(PREFIX) and len(parts) == 3 and parts[0].isdigit() and parts[1].isdigit()


def owner_lives(name: str) -> bool:
    """Whether the process that made the lab `name` still runs."""
    pid, ticks, _ = name.removeprefix(PREFIX).split("-")
    return start_ticks(int(pid)) == int(ticks)


def start_ticks(pid: int) -> int | None:
    """When a process started, in ticks since boot: tells it from a later one of its number. None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])
