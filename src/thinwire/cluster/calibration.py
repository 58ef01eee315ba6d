"""How near a device and its links come to their stated figures: what turns data-sheet numbers into seconds.

A cluster file may carry measured ones. Without them the presets' defaults hold, which were fitted on published runs;
`benchmarks/validate_planner.py` prints how well such fits predict runs that they have not seen.
"""

from typing import Literal

from pydantic import Field

from thinwire.config import Frozen
from thinwire.units import Bytes, Seconds

Origin = Literal["default", "given", "measured"]


class Calibration(Frozen):
    """Shares of stated figures, and what the figures leave out."""

    matmul_efficiency: float = Field(default=0.71, gt=0, le=1)
    """Share of the device's peak that an endlessly large matmul reaches."""
    matmul_half: float = Field(default=56.0, ge=0)
    """Extent of one dimension of a matmul at which half of that is left: efficiency is the product of d / (d + half)."""
    memory_efficiency: float = Field(default=0.9, gt=0, le=1)
    """Share of the memory rate that element-wise work reaches."""
    launch_s: Seconds = Field(default=5e-6, ge=0)
    """Least time between two kernels of eager code: the floor under small work."""
    inner_link_efficiency: float = Field(default=0.86, gt=0, le=1)
    """Share of its stated rate that the innermost level reaches in collectives."""
    outer_link_efficiency: float = Field(default=0.8, gt=0, le=1)
    """The same of every other level."""
    collective_s: Seconds = Field(default=0.0, ge=0)
    """What starting a collective takes beyond the links' latency."""
    overlap_slowdown: float = Field(default=0.1, ge=0)
    """By how much computing is slower while a collective is under way."""
    memory_backward: float = Field(default=2.0, gt=0)
    """Element-wise work of a backward, over that of its forward."""
    weight_s: Seconds = Field(default=0.0, ge=0)
    """What one weight of a block costs a forward however few tokens there are: it is read. A backward takes twice that,
    to read it and to write its gradient."""
    logit_s: Seconds | None = Field(default=None, ge=0)
    """The loss, forward and backward, for one logit; none: as long as its bytes take to be read and written."""
    optimizer_s: Seconds | None = Field(default=None, ge=0)
    """Updating one number: scaling its gradient, the norm, AdamW; none: as long as its states take."""
    collect_s: Seconds = Field(default=0.0, ge=0)
    """Taking one number of a micro-batch's fresh gradient over into the flat sums."""
    sum_s: Seconds = Field(default=0.0, ge=0)
    """Adding up one number that a reduce-scatter received, beyond its way over the link."""
    meeting_s: Seconds = Field(default=0.0, ge=0)
    """What ranks lose by waiting for each other wherever compute stops for a transfer that they carry themselves: one is
    always late, most so where ranks share cores."""
    coding_s: dict[str, tuple[Seconds, Seconds]] = Field(default_factory=dict)
    """Codec -> seconds to code one number and to decode one; those left out take as long as touching their bytes."""
    framework_bytes: Bytes = Field(default=3 * 2**29, ge=0)
    """Memory of the runtime, its communication buffers and what the allocator cannot use."""
    origin: Origin = "default"
    source: str = "ten A100 runs of arXiv 2104.04473, table 1"
    """What the constants were fitted on."""
