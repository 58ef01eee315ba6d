"""Names that Kubernetes accepts. No torch."""

import re

from thinwire.errors import ConfigError


def job_name(text: str) -> str:
    """`text` as a DNS label. Raises ConfigError if nothing of it is one."""
    name = re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")[:50].rstrip("-")
    if not name or not name[0].isalpha():
        raise ConfigError(f"{text!r} makes no name for a job (letters, digits, dashes, a letter first); give --name")
    return name


def volume_claim(text: str) -> tuple[str, str]:
    """`NAME:/PATH` as its two parts. Raises ConfigError."""
    name, colon, path = text.partition(":")
    if not colon or not name or not path.startswith("/"):
        raise ConfigError(f"--claim {text} is not of the form NAME:/PATH")
    return name, path
