"""When a run saves and what: logical tensors and the step. Data order, schedule and RNG are functions of the step."""

from thinwire import __version__
from thinwire.checkpoint.store import Checkpoints, Found, SaveFailed, Saving
from thinwire.config import build
from thinwire.errors import CheckpointError, ConfigError, SaveError
from thinwire.hub.init import load_pieces
from thinwire.parallel.shard.engine import Sharded
from thinwire.parallel.shard.layout import Piece
from thinwire.parallel.shard.optimizer import ShardedOptimizer
from thinwire.plan.plan import Plan
from thinwire.plan.sync import Sync
from thinwire.sync.outer_sync import OuterSync
from thinwire.sync.state import in_flight, own_names, taken_steps, to_load, to_save, without_groups
from thinwire.train.folder import CHECKPOINTS
from thinwire.train.job import Job
from thinwire.train.progress import Reporter
from thinwire.units import show_seconds


class Saver:
    """Saves every `checkpoint.every_steps` and at the end, in the background; resumes from the newest good one."""

    def __init__(
        self,
        job: Job,
        checkpoints: Checkpoints,
        sharded: Sharded,
        optimizer: ShardedOptimizer,
        sync: OuterSync | None,
        reporter: Reporter,
    ) -> None:
        self._job, self._checkpoints, self._reporter = job, checkpoints, reporter
        self._sharded, self._optimizer, self._sync = sharded, optimizer, sync
        self._saving: Saving | None = None
        self._last_asked = 0
        self._newest: str | None = None
        self._failed: SaveFailed | None = None
        """The last save, if that failed."""
        self._adapters = job.config.model.lora is not None
        """The frozen base is read from where it came from; only the adapters are saved."""

    def resume(self) -> int:
        """Load the newest good checkpoint, else imported weights: the step to go on from. Nothing where compute is emulated.

        Raises CheckpointError, and ConfigError if replicas do not hold the same afterwards.
        """
        self._warnings: list[str] = []
        if self._job.emulated:
            return 0
        found = self._checkpoints.newest()
        self._warnings = list(self._checkpoints.warnings)
        if found is None:
            self._start()
            return 0
        self._refuse_other_optimizer(found)
        updates, carried = self._updates(found), self._carried(found)
        meta = self._checkpoints.load(found, self._wanted(found, carried, updated=updates > 0))
        if self._adapters and meta["spec"].get("base") != self._job.spec.model_dump()["base"]:
            raise CheckpointError(
                f"{found.path} holds adapters for other weights than those in {self._job.config.model.hf}; put their base "
                f"back there"
            )
        if meta["corpus"] != self._job.corpus.digest:
            raise CheckpointError(
                f"{found.path} was trained on another corpus (digest {meta['corpus'][:12]}, now "
                f"{self._job.corpus.digest[:12]}); point data.path at that one, or use --fresh"
            )
        self._sharded.loaded()
        self._optimizer.loaded(updates)
        if self._sync is not None:
            self._sync.compare()
        if self._sharded.starts_afresh(carried):
            self._warnings.append(
                f"{found.path.name} does not hold compressed weights as ranks had received them under this plan (it was "
                f"written under another plan, or by an older version): weights begin uncompressed, and losses may differ "
                f"from those of an uninterrupted run"
            )
        self._last_asked, self._newest = found.step, found.path.name
        return found.step

    def _refuse_other_optimizer(self, found: Found) -> None:
        saved, now = found.manifest.meta.get("optimizer", "adamw"), self._job.config.optimizer.name
        if saved != now:
            raise CheckpointError(
                f"{found.path} holds the states of {saved}, and optimizer.name is {now!r}; set optimizer.name = {saved!r}, "
                f"or start anew with --fresh"
            )

    def _updates(self, found: Found) -> int:
        """Optimizer steps taken before; replicas may have skipped different ones."""
        own = None if self._sync is None else taken_steps(self._sync)
        if own is None or own.name not in found.manifest.tensors:
            return int(found.manifest.meta["updates"])
        self._checkpoints.load(found, [own])
        return int(own.tensor)

    def _carried(self, found: Found) -> set[str]:
        """The tensors of a checkpoint among which this rank finds what its group carries from step to step."""
        saved, sync = found.manifest.tensors, self._sync
        if sync is not None:
            return own_names(sync, saved)
        return without_groups(saved) if found.manifest.meta["plan"].get("sync") else set(saved)

    def _wanted(self, found: Found, carried: set[str], *, updated: bool) -> list[Piece]:
        """What this rank reads of a checkpoint, whoever saved it under whatever plan."""
        inner = self._sharded.for_load(trained_only=self._adapters)
        sync, saved = self._sync, found.manifest.tensors
        optimizer = (
            self._optimizer.for_load({*saved, *carried}) if updated else []
        )  # else the first step makes the states
        if sync is None:
            return [*inner, *optimizer, *self._sharded.carried_for_load(carried)]
        same = sync_of(found) == sync.sync
        sync.go_on(found.step, flights=in_flight(sync, saved) if same else ())
        optimizer += self._sharded.carried_for_load(carried)
        return to_load(sync, inner, optimizer, saved, same=same)

    def _start(self) -> None:
        """Imported weights in the place of drawn ones, each rank reading what it owns."""
        if self._job.init is not None:
            load_pieces(self._job.init.folder, self._sharded.for_load())
            self._sharded.loaded()
            if self._sync is not None:
                self._sync.start_here()

    def after_step(self, step: int, *, last: bool) -> None:
        """Save if it is time; look after a save in flight. Weights that nothing has trained are never saved."""
        if self._job.emulated:
            return
        self._collect(wait=False)
        every = self._job.config.checkpoint.every_steps
        if (last or (every > 0 and step % every == 0)) and step != self._last_asked:
            self._collect(wait=True)
            self._save(step)

    def finish(self) -> None:
        """Wait for a save in flight."""
        self._collect(wait=True)

    @property
    def saved(self) -> bool:
        """Whether the last save went well."""
        return self._failed is None

    def require_saved(self) -> None:
        """Raises SaveError, on all ranks, if the last save failed: what was computed since the one before is lost."""
        if self._failed is not None:
            raise SaveError(
                f"the last checkpoint, of step {self._failed.step}, could not be saved: {self._failed.reason}; the newest "
                f"is {self.newest_name() or 'none'}: make room and start the same command again, which goes on from there"
            )

    def newest_name(self) -> str | None:
        """Path of the newest checkpoint that is whole, relative to the run folder's parent."""
        return None if self._newest is None else str(self._job.folder / CHECKPOINTS / self._newest)

    def announce(self) -> None:
        """Tell what was wrong with checkpoints that were passed over, once there is a console."""
        for warning in self._warnings:
            self._reporter.warn(warning)

    def _save(self, step: int) -> None:
        self._sharded.drain()
        inner, sync = self._sharded.for_save(trained_only=self._adapters), self._sync
        optimizer = [*self._optimizer.for_save(), *self._sharded.carried_for_save()]
        pieces = (
            [*inner, *optimizer] if sync is None else to_save(sync, inner, optimizer, updates=self._optimizer.updates)
        )
        meta = {
            "step": step,
            "updates": self._optimizer.updates,
            "optimizer": self._job.config.optimizer.name,
            "corpus": self._job.corpus.digest,
            "spec": self._job.spec.model_dump(mode="json"),
            "plan": self._job.plan.model_dump(mode="json"),
            "thinwire": __version__,
        }
        self._saving = self._checkpoints.save(step, pieces, meta)
        self._last_asked = step

    def _collect(self, *, wait: bool) -> None:
        saving = self._saving
        if saving is None or not (wait or saving.done()):
            return
        self._saving = None
        outcome = saving.result()
        self._failed = outcome if isinstance(outcome, SaveFailed) else None
        if isinstance(outcome, SaveFailed):
            self._reporter.warn(
                f"the checkpoint of step {outcome.step} could not be saved: {outcome.reason}; training goes on, the last "
                f"good checkpoint is {self.newest_name() or 'none'}"
            )
            return
        self._newest = outcome.path.name
        self._reporter.event(
            "checkpoint",
            step=outcome.step,
            path=str(outcome.path),
            stall_s=saving.stall_s,
            save_s=outcome.save_s,
            bytes=outcome.bytes,
        )
        if outcome.step == self._job.config.run.steps:
            self._reporter.say(f"saved {outcome.path} in {show_seconds(outcome.save_s)}")


def sync_of(found: Found) -> Sync | None:
    """The outer synchronisation of the plan under which a checkpoint was saved; None where this release knows no such."""
    try:
        return build(Plan, found.manifest.meta["plan"], "the checkpoint's plan").sync
    except ConfigError:
        return None
