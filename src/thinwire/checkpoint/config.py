"""`[checkpoint]` of a run file. No torch."""

from pydantic import Field

from thinwire.config import Frozen


class CheckpointConfig(Frozen):
    """When a run saves and what it keeps."""

    every_steps: int = Field(default=100, ge=0, le=10**12)
    """0: only at the end and when a stop is asked for."""
    keep_last: int = Field(default=2, ge=1, le=10**6)
    keep_every: int = Field(default=0, ge=0, le=10**12)
    """Also keep every checkpoint whose step is a multiple of this; 0: none."""
    verify: bool = True
    """Compare digests, not only sizes, before a checkpoint is used."""
