"""What schedulers accept as names and options, out of what a user writes. No torch."""

import re
from collections.abc import Iterable

from thinwire.config import show_text
from thinwire.errors import ConfigError

_OURS = re.compile(r"RANK|WORLD_SIZE|LOCAL_RANK|PET_.*|SLURM_.*")
"""Variables in which a launcher tells each rank its place."""


def job_name(text: str) -> str:
    """`text` as a DNS label. Raises ConfigError if nothing of it is one."""
    name = re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")[:50].rstrip("-")
    if not name or not name[0].isalpha():
        raise ConfigError(
            f"{show_text(text)} makes no name for a job (letters, digits, dashes, a letter first); give --name"
        )
    return name


def volume_claim(text: str) -> tuple[str, str]:
    """`NAME:/PATH` as its two parts. Raises ConfigError."""
    name, colon, path = one_line("--claim", text).partition(":")
    if not colon or not name or not path.startswith("/"):
        raise ConfigError(f"--claim {text} is not of the form NAME:/PATH")
    return name, path


def memory(text: str) -> str:
    """A size as sbatch takes it: `64G`. Raises ConfigError."""
    if re.fullmatch(r"[0-9]{1,9}[KMGTkmgt]?", text) is None:
        raise ConfigError(f"--mem {text} is no size; write for example 64G, or 0 for all of a node's memory")
    return text


def variables(given: Iterable[str]) -> dict[str, str]:
    """`NAME=VALUE` each. Raises ConfigError for what is none, or is a launcher's own."""
    found = {}
    for text in given:
        name, equals, value = one_line("--env", text).partition("=")
        if not equals or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
            raise ConfigError(f"--env {text} is not of the form NAME=VALUE")
        if _OURS.fullmatch(name):
            raise ConfigError(
                f"--env {text}: {name} is set by the launcher, which tells each rank its place; leave it out"
            )
        found[name] = value
    return found


def one_line(what: str, text: str) -> str:
    """`text`, which becomes (part of) one line of a script. Raises ConfigError if it is empty or has more lines."""
    if not text.strip():
        raise ConfigError(f"{what} is empty; leave it out, or say something")
    if any(ord(letter) < 32 or letter in "\x7f\x85\u2028\u2029" for letter in text):
        raise ConfigError(
            f"{what} {show_text(text)} has a line break or another control character; write it in one line"
        )
    return text
