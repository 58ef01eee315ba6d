"""`[model.lora]` of a run file: low-rank adapters on a frozen model (LoRA, arXiv 2106.09685). No torch."""

from pydantic import Field

from thinwire.config import Frozen


class LoraOptions(Frozen):
    """Adapters of rank `rank`, scaled by alpha / rank, on the linear layers named in `targets`."""

    rank: int = Field(default=16, ge=1, le=10**5)
    alpha: float = Field(default=32.0, gt=0, le=1e6)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] | str = "all-linear"
    """Ends of module names, such as `["q_proj", "v_proj"]`, or `all-linear`: every linear layer but the head."""
