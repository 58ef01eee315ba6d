"""The parts of a run on one rank: model, engine, optimizer, data feed, checkpoints and reporter."""

from dataclasses import dataclass

from thinwire.checkpoint.store import Checkpoints
from thinwire.comm.world import World
from thinwire.data.loader import Prefetcher
from thinwire.model.generate import LanguageModel
from thinwire.parallel.shard.engine import Sharded
from thinwire.parallel.shard.optimizer import ShardedOptimizer
from thinwire.sync.outer_sync import OuterSync
from thinwire.train.job import Job
from thinwire.train.progress import Reporter


@dataclass
class Parts:
    """What the loop works with."""

    job: Job
    world: World
    group: World
    """The ranks that synchronise every step: the whole world, or those of this rank's replica."""
    sync: OuterSync | None
    model: LanguageModel
    sharded: Sharded
    optimizer: ShardedOptimizer
    feed: Prefetcher
    checkpoints: Checkpoints
    nominal_tokens: int
    """Tokens of a full batch of the group: the constant by which its ranks scale their loss."""
    cross_documents: bool
    peak_flops_per_s: float
    peak_origin: str
    reporter: Reporter

    def begin(self, step: int) -> None:
        """Start feeding from `step` and, on rank 0, reporting."""
        self.feed.start(step)
        self.world.ledger.drain()  # loading is no step
        if self.world.rank == 0:
            self.reporter.open(self.job, step=step)

    def close(self) -> None:
        self.feed.close()
        self.reporter.close()
