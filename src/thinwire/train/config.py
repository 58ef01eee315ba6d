"""The run file: one TOML document with a section for each room that reads it. No torch here."""

import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from thinwire.checkpoint.config import CheckpointConfig
from thinwire.cluster.config import ClusterConfig
from thinwire.config import Frozen
from thinwire.data.corpus import DataConfig
from thinwire.model.config import ModelConfig
from thinwire.plan.optimizers import OptimizerConfig
from thinwire.plan.plan import PlanConfig
from thinwire.train.trackers import TrackingConfig
from thinwire.units import Seconds, divisors


class BatchConfig(Frozen):
    """`[batch]`: how many tokens make one optimizer step."""

    sequences: int = Field(default=16, ge=1, le=10**9)
    """Sequences in one optimizer step, over all ranks."""
    tokens: int = Field(default=256, ge=2, le=10**9)
    """Tokens in one sequence."""
    micro_batch: int | None = Field(default=None, ge=1, le=10**9)
    """Sequences per rank in one forward and backward; default: all of a rank's share at once."""

    def split(self, ranks: int) -> tuple[int, int]:
        """`(micro_batch, accumulate)` for `ranks` data-parallel ranks. Raises ValueError with what would divide."""
        if self.sequences % ranks:
            nearest = max(1, round(self.sequences / ranks)) * ranks
            raise ValueError(
                f"batch.sequences = {self.sequences} is not divisible by {ranks} ranks; try sequences = {nearest}"
            )
        share = self.sequences // ranks
        micro = self.micro_batch or share
        if share % micro:
            fitting = max(size for size in divisors(share) if size <= micro)
            raise ValueError(
                f"batch.sequences = {self.sequences} over {ranks} ranks is {share} a rank, which micro_batch = {micro} "
                f"does not divide; try micro_batch = {fitting}"
            )
        return micro, share // micro


WARMUP_STEPS = 20


class ScheduleConfig(Frozen):
    """`[schedule]`: the learning rate over the run."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: int | None = Field(default=None, ge=0, le=10**12)
    """Default: 20, and of a run that is no longer than that a twentieth."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """`wsd`: the share of the steps after warm-up that the final decay takes."""
    final_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""

    def warmup(self, total_steps: int) -> int:
        """Steps of warm-up in a run of `total_steps`."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return WARMUP_STEPS if total_steps > WARMUP_STEPS else math.ceil(total_steps / 20) if total_steps > 1 else 0


class RunSection(Frozen):
    """`[run]`: how long, where to, and what to say meanwhile."""

    folder: Path | None = None
    """The run folder; default `runs/` and the run file's name."""
    steps: int = Field(default=300, ge=1, le=10**12)
    seed: int = Field(default=1234, ge=0, le=2**62)
    log_every: int = Field(default=10, ge=1)
    """Steps between the plain progress lines of a run without a terminal. Every step is in `events.jsonl`."""
    eval_every: int = Field(default=100, ge=0)
    """Steps between validations; 0: only before the first and after the last step."""
    eval_sequences: int = Field(default=64, ge=0)
    """Held-out sequences in one validation; 0: all of them."""
    sample_tokens: int = Field(default=200, ge=0)
    """Tokens of the text shown at the end; 0: none."""
    sample_prompt: str | None = None
    """What it continues, of a corpus of conversations a user's message; default: how a validation document begins."""
    max_bad_steps: int = Field(default=5, ge=1)
    """Stop after this many steps in a row whose loss or gradient norm is not finite."""
    compile: bool = False
    """Compile the model's blocks with torch.compile."""
    trace_steps: int = Field(default=3, ge=0, le=1000)
    """Steps of each start, the first left out, that rank 0 records moment by moment in `trace.json`; 0: none."""
    timeout: Seconds = Field(default=600.0, ge=1e-3, le=1e6)
    """A collective that takes longer than this ends the run."""


Took = Annotated[Seconds, Field(le=1e6)]


class ComputeConfig(Frozen):
    """`[compute]`: what a rank sleeps for in place of computing, so that ranks may share cores. Such a run trains nothing.

    Pairs are seconds of the forward and of the backward of one micro-batch, recomputation left out: it comes as a second
    forward. `thinwire lab run --compute emulated` fills the table from what is predicted for `cluster.device`.
    """

    embedding: tuple[Took, Took]
    block: tuple[Took, Took]
    """Each of the model's blocks."""
    head: tuple[Took, Took]
    """Final norm, head and loss."""
    update: Took = 0.0
    """The optimizer's update of one number."""
    slow: tuple[Annotated[float, Field(gt=0, le=1e6)], ...] = ()
    """By which factor each rank takes longer, rank 0's first; none: all take as long."""
    source: str = "seconds given by hand"
    """Where these seconds come from."""


class RunFile(Frozen):
    """A whole run file, for whoever needs no text: planning does not."""

    model: ModelConfig = ModelConfig()
    data: DataConfig | None = None
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    cluster: ClusterConfig = ClusterConfig()
    plan: PlanConfig = PlanConfig()
    compute: ComputeConfig | None = None
    """None: ranks compute."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        warmup = self.schedule.warmup_steps
        if warmup and warmup >= self.run.steps:
            raise ValueError(
                f"schedule.warmup_steps = {warmup} leaves nothing of run.steps = {self.run.steps}; "
                f"try warmup_steps = {math.ceil(self.run.steps / 20) if self.run.steps > 1 else 0}, or leave it out"
            )
        return self


class RunConfig(RunFile):
    """A run file for training, which needs text."""

    data: DataConfig


MAY_CHANGE = ("run.steps", "run.folder", "run.log_every", "run.eval_every", "run.eval_sequences", "run.sample_tokens",
              "run.sample_prompt", "run.max_bad_steps", "run.trace_steps", "run.timeout", "run.compile", "optimizer.lr",
              "checkpoint.", "cluster.", "plan.", "tracking.", "batch.micro_batch", "data.path", "data.sources",
              "data.tokenizer")  # fmt: skip
"""Keys (or sections) in which a resumed run may differ from the run it goes on with.

Where and how the same numbers are computed may change; what is computed may not, but for how long a run is and its peak
learning rate, of which a line says what they change. The corpus itself is compared by its
digest, so its path may change.
"""
