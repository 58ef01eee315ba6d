"""The training loop. It reads as a story; communication is called by name.

The loss of a step is the sum of token losses over the global count of valid tokens, so any split of the batch over ranks
and micro-batches gives the same gradient: every rank back-propagates its sum over a constant (the nominal token count),
the engine sums over ranks, and the ratio of nominal to counted tokens scales the result once. A step without a valid
token has no gradient, so it is none: weights, optimizer states and what codecs carry over stay as they are.

All ranks agree when to stop. Inside a replica that is known every step; across replicas it travels behind them.
"""

import math
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from thinwire.comm.collectives import all_reduce_small
from thinwire.comm.handle import Handle
from thinwire.comm.transport.transport import all_gather_single
from thinwire.comm.world import World
from thinwire.data.loader import Batch
from thinwire.errors import DivergenceError
from thinwire.train.announce import announce, conclude, sample
from thinwire.train.clock import StepClock
from thinwire.train.job import Job
from thinwire.train.parts import Parts
from thinwire.train.progress import mfu
from thinwire.train.saving import Saver
from thinwire.train.schedule import lr_at
from thinwire.train.stop import StopRequest
from thinwire.train.validate import validate

# B batch, T tokens


def train(job: Job, parts: Parts, stop: StopRequest) -> None:
    """Train to the last step of `job`, or until a stop is asked for; resumes what its folder holds.

    Raises DivergenceError after `run.max_bad_steps` non-finite steps in a row, and whatever a rank raises.
    """
    saver = Saver(job, parts.checkpoints, parts.sharded, parts.optimizer, parts.sync, parts.reporter)
    parts.world.status.enter("the start of the run")
    step = saver.resume()
    total = job.config.run.steps
    parts.begin(step)
    announce(
        job, parts.sharded, parts.sync, parts.reporter, step=step, peak=(parts.peak_flops_per_s, parts.peak_origin)
    )
    saver.announce()
    if step == 0:
        _validate(job, parts, step)
    bad_in_a_row, stopping, vote = 0, False, StopVote(parts.world, parts.group)
    clock = StepClock(parts.world.device)
    while step < total and not stopping:
        clock.start()
        record, asked = train_step(job, parts, step, clock, stop)
        step += 1
        stopping = vote.after(step, asked=asked)
        synchronise(parts, step, tokens=record["tokens"], last=step == total)
        clock.lap("sync")
        parts.world.status.enter("the end (records, checkpoint, validation)", step)
        if record["loss"] is not None:  # a step without a scored token says nothing of the others
            bad_in_a_row = bad_in_a_row + 1 if record["skipped"] else 0
        _give_up_if_diverged(job, saver, bad_in_a_row, step)
        saver.after_step(step, last=stopping or step == total)
        clock.lap("checkpoint")
        close_record(job, parts, record, clock)
        if _due(job.config.run.eval_every, step) or step == total:
            _validate(job, parts, step)
    vote.close()
    parts.world.status.enter("the end of the run", step)
    saver.finish()
    _conclude(job, parts, saver, step=step, stopped=stopping and step < total, by=stop.by)
    saver.require_saved()


def _validate(job: Job, parts: Parts, step: int) -> None:
    if job.emulated:
        return
    validate(job, parts.world, parts.model, parts.sharded, parts.sync, parts.reporter, step=step)


def _conclude(job: Job, parts: Parts, saver: Saver, *, step: int, stopped: bool, by: str) -> None:
    """Show the summary; after a finished run a sample of text too, after a stop how to resume."""
    parts.sharded.drain()
    with parts.sync.outer_weights() if parts.sync is not None else nullcontext():
        text = None if stopped or job.emulated else sample(job, parts.model, parts.reporter)
    reason = f"stopped by {by or 'another rank'}" if stopped else "finished"
    conclude(
        job,
        parts.sharded,
        parts.reporter,
        step=step,
        reason=reason if saver.saved else f"{reason}, but not saved",
        checkpoint=saver.newest_name(),
        text=text,
    )
    if stopped and saver.saved and not job.emulated:
        parts.reporter.say(f"stopped after step {step}; the same command goes on from there")


def train_step(job: Job, parts: Parts, step: int, clock: StepClock, stop: StopRequest) -> tuple[dict[str, Any], bool]:
    """One optimizer step: `(its record without timings, whether a rank of the group asks for a stop)`."""
    torch.manual_seed(job.config.run.seed + step)  # of all devices
    parts.world.status.enter("the data", step + 1)
    micro_batches = parts.feed.next()
    parts.world.status.enter("forward and backward", step + 1)
    clock.lap("data")
    summed, valid_tokens = torch.zeros((), dtype=torch.float64, device=parts.world.device), 0
    for i, batch in enumerate(micro_batches):
        with parts.sharded.micro_batch(last=i == len(micro_batches) - 1):
            loss, valid = forward(parts, batch)
            clock.lap("forward")
            (loss / parts.nominal_tokens).backward()  # type: ignore[no-untyped-call]
            clock.lap("backward")
        summed += loss.detach().double()
        valid_tokens += valid
    parts.world.status.enter("the sums and the optimizer", step + 1)
    parts.sharded.finish_reduce()
    sums = torch.tensor([summed.item(), valid_tokens, stop.asked], dtype=torch.float64)
    all_reduce_small(sums, world=parts.group, op="sum")
    loss_sum, tokens, stops = sums.tolist()
    scale = parts.nominal_tokens / max(1.0, tokens)
    grad_norm = parts.sharded.grad_norm() * scale
    clock.lap("comm")
    lr = lr_at(step, peak=job.config.optimizer.lr, total_steps=job.config.run.steps, schedule=job.config.schedule)
    loss_mean = loss_sum / tokens if tokens else None
    skipped = loss_mean is None or not (math.isfinite(loss_mean) and math.isfinite(grad_norm))
    if skipped:
        parts.optimizer.skip()
    else:
        parts.optimizer.set_lr(lr)
        parts.optimizer.step(grad_scale=scale * clip_factor(grad_norm, job.config.optimizer.clip_norm))
    clock.lap("optimizer")
    record = {
        "step": step + 1, "loss": loss_mean, "lr": lr, "grad_norm": grad_norm, "tokens": int(tokens), "skipped": skipped,
    }  # fmt: skip
    return record, stops > 0


def synchronise(parts: Parts, step: int, *, tokens: int, last: bool) -> None:
    """Replicas send and apply what the schedule of their rounds says; after the last step what is still in flight."""
    if parts.sync is None:
        return
    rounds = parts.sync.after(step, tokens=tokens)
    if last:
        rounds += parts.sync.settle()
    for done in rounds:
        parts.reporter.event("sync", step=step, **asdict(done))


def forward(parts: Parts, batch: Batch) -> tuple[torch.Tensor, int]:
    """`(sum of token losses, count of valid tokens)` of one micro-batch on this rank."""
    device = parts.world.device
    tokens_BT = torch.from_numpy(batch.tokens_BT).to(device, non_blocking=True)
    targets_BT = torch.from_numpy(batch.targets_BT).to(device, non_blocking=True)
    if parts.cross_documents:
        loss = parts.model(tokens_BT, targets_BT)
    else:
        positions_BT = torch.from_numpy(batch.positions_BT).to(device, non_blocking=True)
        documents_BT = torch.from_numpy(batch.documents_BT)  # stays on the host, where attention reads it
        loss = parts.model(tokens_BT, targets_BT, positions_BT=positions_BT, documents_BT=documents_BT)
    return loss, int((batch.targets_BT >= 0).sum())


def clip_factor(grad_norm: float, clip_norm: float) -> float:
    """What the gradient is multiplied with so that its norm is at most `clip_norm` (0: never clip)."""
    return min(1.0, clip_norm / (grad_norm + 1e-6)) if clip_norm > 0 else 1.0


def _give_up_if_diverged(job: Job, saver: Saver, bad_in_a_row: int, step: int) -> None:
    if bad_in_a_row >= job.config.run.max_bad_steps:
        saver.finish()
        good = saver.newest_name()
        raise DivergenceError(
            f"the loss or gradient norm was not finite in {bad_in_a_row} steps in a row, up to step {step}; "
            + (f"the last good checkpoint is {good}" if good else "there is no checkpoint yet")
            + "; try a lower optimizer.lr or a longer schedule.warmup_steps"
        )


def close_record(job: Job, parts: Parts, record: dict[str, Any], clock: StepClock) -> None:
    """Add timings and wire bytes to the step's record and publish it. Every token processed takes time, scored or not.

    With several replicas the loss is that of rank 0's, and every replica's tokens are taken to be as many as its.
    """
    wire = parts.world.ledger.drain()
    seconds = clock.stop(exposed_comm_s=wire.exposed_s)
    step_s = sum(seconds.values())
    batch = job.config.batch
    record["tokens"] *= parts.world.size // parts.group.size
    tokens_per_s = batch.sequences * batch.tokens / step_s
    record.update(
        processed_tokens=batch.sequences * batch.tokens,
        step_s=round(step_s, 6),
        tokens_per_s=round(tokens_per_s, 1),
        mfu=mfu(
            job.spec,
            tokens_per_sequence=batch.tokens,
            tokens_per_s=tokens_per_s,
            ranks=parts.world.size,
            peak=parts.peak_flops_per_s,
        ),
        seconds=seconds,
        wire=wire.sent_bytes(),
    )
    if job.emulated:
        record.update(loss=None, grad_norm=None)
    parts.reporter.step(record, clock.laps, wire.entries)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


EVERY = 10
"""Steps between two votes across groups: a stop takes effect 10 to 20 steps after it was asked for."""


class StopVote:
    """Every rank's group says whether it wants to stop; the answer of one vote is read when the next begins.

    So groups drift apart by up to that many steps without waiting for each other, and stop after the same step.
    """

    def __init__(self, world: World, group: World) -> None:
        self._world = world
        alike = range(world.rank % group.size, world.size, group.size)
        self._group = world.communicator(alike, members_only=True, small=True) if len(alike) > 1 else None
        self._level = world.level_name(len(world.cluster.levels) - 1)
        self._asked = False
        self._handle: Handle | None = None
        self._votes = torch.zeros(0)

    def after(self, step: int, *, asked: bool) -> bool:
        """Whether to stop now, after `step`; `asked`: whether this rank's group wants to."""
        if self._group is None:
            return asked
        self._asked = self._asked or asked
        if step % EVERY:
            return False
        stop = self._read()
        self._cast(self._group)
        return stop

    def close(self) -> None:
        """Wait for a vote that nobody needs any more."""
        self._read()

    def _read(self) -> bool:
        if self._handle is None:
            return False
        self._handle.wait()
        self._handle = None
        return bool(self._votes.any())

    def _cast(self, group: dist.ProcessGroup) -> None:
        own = torch.tensor([float(self._asked)])
        self._votes = torch.empty(dist.get_world_size(group))
        entry = self._world.ledger.open(
            level=self._level,
            kind="all_gather",
            purpose="control",
            payload_bytes=self._votes.nbytes,
            sent_bytes=own.nbytes * (len(self._votes) - 1),
            codec="identity",
        )
        work = all_gather_single(self._votes, own, group=group)
        self._handle = Handle(self._world.outstanding, entry, [work], keep=(own, self._votes))
