"""Validation during training: every rank scores its share of the validation split, then sums are added.

Replicas score the outer weights, which are what a checkpoint exports.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch

from thinwire.comm.collectives import all_reduce_small
from thinwire.comm.world import World
from thinwire.data.loader import Batch, evaluation_batches, ignored_like
from thinwire.data.notes import FEW_TOKENS
from thinwire.evaluate.scoring import Score, score
from thinwire.model.generate import LanguageModel
from thinwire.parallel.shard.engine import Sharded
from thinwire.sync.outer_sync import OuterSync
from thinwire.train.job import Job
from thinwire.train.progress import Reporter
from thinwire.units import SYSTEM_CLOCK, SystemClock, show_seconds


def validate(
    job: Job,
    world: World,
    model: LanguageModel,
    sharded: Sharded,
    sync: OuterSync | None,
    reporter: Reporter,
    *,
    step: int,
    clock: SystemClock = SYSTEM_CLOCK,
) -> Score | None:
    """Score the first `run.eval_sequences` sequences of the validation split and report; None if there is none."""
    if job.corpus.heldout is None or job.corpus.heldout.tokens == 0:
        if step == 0:
            reporter.say(f"no validation: {job.config.data.path} holds no validation split")
        return None
    start_s = clock.now()
    sharded.drain()
    with world.ledger.apart():
        total = _score(job, world, model, sync)
    _report(reporter, step, total, clock.now() - start_s)
    return total


def _score(job: Job, world: World, model: LanguageModel, sync: OuterSync | None) -> Score:
    with sync.outer_weights() if sync is not None else nullcontext():
        own = score(
            model,
            _share(job, world),
            token_bytes=job.corpus.token_bytes,
            cross_documents=job.corpus.cross_documents,
        )
    sums = torch.tensor([own.loss_sum, own.tokens, own.text_bytes], dtype=torch.float64)
    all_reduce_small(sums, world=world, op="sum")
    return Score(float(sums[0]), int(sums[1]), int(sums[2]))


def _share(job: Job, world: World) -> Iterator[Batch]:
    """This rank's batches. All ranks take the same number of forwards: a rank without text scores an empty batch."""
    assert job.corpus.heldout is not None
    limit = job.config.run.eval_sequences
    size, ranks = job.plan.micro_batch, world.size
    batches = list(
        evaluation_batches(
            job.corpus.heldout,
            job.config.batch.tokens,
            size,
            limit=limit or None,
            vocab_size=job.spec.vocab_size,
            cross_documents=job.corpus.cross_documents,
        )
    )
    rounds = -(-len(batches) // ranks)
    for index in range(rounds):
        mine = index * ranks + world.rank
        yield batches[mine] if mine < len(batches) else ignored_like(batches[0])


def _report(reporter: Reporter, step: int, total: Score, seconds: float) -> None:
    bits, scored = total.bits_per_byte, total.tokens > 0
    reporter.event(
        "eval",
        step=step,
        loss=total.loss if scored else None,
        perplexity=total.perplexity if scored else None,
        bits_per_byte=bits,
        tokens=total.tokens,
        seconds=round(seconds, 3),
    )
    if not scored:
        reporter.say(f"validation at step {step}: no token of the validation split is scored")
        return
    shown = "" if bits is None else f", {bits:.4f} bits per byte"
    few = ", too few to compare losses by" if total.tokens < FEW_TOKENS else ""
    reporter.say(
        f"validation at step {step}: loss {total.loss:.4f}, perplexity {total.perplexity:.2f}{shown} "
        f"({total.tokens:,} tokens{few}, {show_seconds(seconds)})"
    )
