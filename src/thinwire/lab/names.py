"""A lab's name: a prefix, and which process owns it, so that what is left over can be told from what is in use."""

import os
import secrets

from thinwire.processes import start_ticks

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
