"""What a run says before its first step and after its last: tables, events, a sample of what the model writes.

Before: where each state lives and what the plan will send, by formula, unit by unit of the engine; which numbers travel
uncompressed although a codec is named, and which codecs have nothing to compress. After: what was sent, and how to go on.
"""

from dataclasses import asdict, dataclass

from rich.table import Table

from thinwire.data.chat import Prompt, chat_prompt, opening, text_prompt
from thinwire.data.tokenizer import Tokenizer
from thinwire.errors import DataError
from thinwire.hub.init import HUB
from thinwire.model.generate import LanguageModel, generate
from thinwire.parallel.shard.states import ShardedStates
from thinwire.plan.hops import CONTROL
from thinwire.plan.operations import Bytes
from thinwire.sync.outer_sync import OuterSync
from thinwire.train.folder import EVENTS_FILE
from thinwire.train.job import Job
from thinwire.train.progress import Reporter
from thinwire.units import show_bytes

Sent = dict[str, dict[str, int]]
"""Level -> purpose -> bytes."""


def announce(
    job: Job, sharded: ShardedStates, sync: OuterSync | None, reporter: Reporter, *, step: int, peak: tuple[float, str]
) -> None:
    """Say that the run starts after `step`, under which plan. `peak`: FLOP per second of a rank, and how that is known."""
    if not reporter.speaks:
        return
    held = held_bytes(sharded, job.config.optimizer.state_numbers)
    reporter.event(
        "run_start",
        step=step,
        ranks=sharded.world.size if sync is None else sync.world.size,
        parameters=job.spec.parameters,
        plan=job.plan.digest,
        corpus=job.corpus.digest,
        peak_flops_per_s=peak[0],
        peak_origin=peak[1],
        wire_predicted=predicted_bytes(sharded),
        held={**held, **({"outer": sync.held_bytes()} if sync else {})},
        uncoded={level: asdict(left) for level, left in uncompressed(sharded).items()},
        idle_codecs=idle_codecs(sharded),
        emulated=None if job.config.compute is None else job.config.compute.model_dump(mode="json"),
    )
    reporter.show(plan_table(sharded, sync, state_numbers=job.config.optimizer.state_numbers))
    if sync is not None:
        reporter.show(rounds_table(sync))


def plan_table(sharded: ShardedStates, sync: OuterSync | None = None, *, state_numbers: int = 2) -> Table:
    """state -> level -> bytes on this rank; level -> purpose -> bytes per step by the formula; what codecs leave out."""
    partition, held = sharded.plan.partition, held_bytes(sharded, state_numbers)
    table = Table("what", "where", "bytes on rank 0", title=f"plan {partition}", title_justify="left")
    for state in ("params", "grads", "optimizer"):
        shown = show_bytes(held[state]) if held[state] else "they are the fp32 masters"
        table.add_row(state, getattr(partition, state), shown)
    if sync is not None:
        table.add_row("outer weights and momentum", "host memory", show_bytes(sync.held_bytes()))
    table.add_section()
    for level, purposes in predicted_bytes(sharded).items():
        for purpose, count in purposes.items():
            codec = _codec(sharded, level, purpose)
            table.add_row(f"{purpose} a step", f"{level}{codec}", show_bytes(count))
    first = sharded.plan.compression.whole_steps
    for level, purposes in predicted_bytes(sharded, 0).items() if first else ():
        full = sum(count for purpose, count in purposes.items() if purpose.startswith("G-"))
        if sharded.plan.compression.grads.get(level) == "lowrank":
            table.add_row(f"gradients, first {first} steps", f"{level} (uncompressed)", show_bytes(full))
    table.add_section()
    for level, left in uncompressed(sharded).items():
        table.add_row("not compressed", f"{level} ({left.codec})", f"{left.numbers:,} of {left.of:,} numbers")
    for where, codec in idle_codecs(sharded).items():
        table.add_row("nothing to compress", f"{where} ({codec})", "-")
    return table


def rounds_table(sync: OuterSync) -> Table:
    """When replicas synchronise what, and the bytes of each exchange by the formula."""
    point, ours = sync.sync, sync.world.rank
    title = f"{point.groups} groups across {point.level}: {point.kind}, every {point.inner_steps} steps ({point.codec})"
    table = Table("fragment", "units", "first sent, applied after step", f"bytes of rank {ours} a round", title=title)
    table.title_justify = "left"
    if point.groups == 1:
        table.title = f"one group, every {point.inner_steps} steps: it agrees with itself (Lookahead, arXiv 1907.08610)"
    for first in sync.schedule.table(point.inner_steps):
        fragment = sync.fragments[first.fragment]
        units = ", ".join(dict.fromkeys(share.unit_name for share in fragment.shares))
        sent = sync.bytes_of(first.fragment)
        table.add_row(str(first.fragment), units, f"{first.send}, {first.apply}", show_bytes(sent))
    return table


def compare(predicted: dict[str, dict[str, int]], measured: dict[str, dict[str, int]]) -> Table:
    """Predicted bytes beside what the ledger counted; `control` and other purposes are shown too."""
    table = Table("level", "purpose", "predicted", "measured", title="bytes sent by rank 0", title_justify="left")
    for level in dict.fromkeys([*predicted, *measured]):
        of_level, counted = predicted.get(level, {}), measured.get(level, {})
        for purpose in dict.fromkeys([*of_level, *counted]):
            said = show_bytes(of_level[purpose]) if purpose in of_level else "-"
            table.add_row(level, purpose, said, show_bytes(counted.get(purpose, 0)))
    return table


def conclude(
    job: Job,
    sharded: ShardedStates,
    reporter: Reporter,
    *,
    step: int,
    reason: str,
    checkpoint: str | None,
    text: str | None,
) -> None:
    """Show the summary, and `text` as a sample; `checkpoint` is the newest."""
    reporter.event("run_end", step=step, reason=reason)
    if not reporter.speaks:
        return
    totals = reporter.totals
    rows = {"run folder": str(job.folder), "step": f"{step} of {job.config.run.steps}"}
    if checkpoint:
        rows["checkpoint"] = checkpoint
    rows["steps and causes"] = str(job.folder / EVENTS_FILE)
    tables = [totals.table(rows)]
    if totals.wire:
        tables.append(compare(predicted_total(sharded, step - totals.steps, totals.steps), totals.wire))
    reporter.conclude(tables, text)


def sample(job: Job, model: LanguageModel, reporter: Reporter) -> str | None:
    """Text the model writes after `run.sample_prompt`, or after the beginning of its data; None without a tokenizer.

    Of a corpus of conversations the prompt is a user's message. All ranks generate in step.
    """
    tokenizer, run = job.corpus.tokenizer, job.config.run
    if tokenizer is None or run.sample_tokens == 0:
        return None
    try:
        prompt = _prompt(job, tokenizer).fitting(job.spec.max_tokens // 2)
    except DataError as error:
        reporter.warn(f"no sample: {error}")
        return None
    model.eval()
    made = generate(
        model,
        prompt.ids,
        max_new_tokens=min(run.sample_tokens, job.spec.max_tokens - len(prompt.ids)),
        max_tokens=job.spec.max_tokens,
        temperature=0.8,
        top_p=0.95,
        seed=run.seed,
        stop_ids=prompt.stop_ids,
    )
    ids = list(made)
    model.train()
    return tokenizer.decode([*prompt.ids, *ids])


def _prompt(job: Job, tokenizer: Tokenizer) -> Prompt:
    text = job.config.run.sample_prompt
    if not text:
        return opening(job.corpus)
    if job.corpus.conversations:
        return chat_prompt(tokenizer, [job.config.data.path, job.folder / HUB], text)
    return text_prompt(tokenizer, text)


def _codec(sharded: ShardedStates, level: str, purpose: str) -> str:
    side = sharded.plan.compression.weights if purpose.startswith("P-") else sharded.plan.compression.grads
    return f" ({side[level]})" if level in side else ""


def predicted_bytes(sharded: ShardedStates, step: int | None = None) -> Sent:
    """level name -> purpose -> bytes this rank sends in an optimizer step, by its program; small sums left out.

    Steps are counted from 0; without one, it is any step after those that send more in the beginning.
    """
    return _named(sharded, sharded.program(step).sent_bytes())


def predicted_total(sharded: ShardedStates, first: int, steps: int) -> Sent:
    """The same of `steps` steps from `first` on."""
    full = max(0, min(first + steps, sharded.plan.compression.whole_steps) - first)
    sums: Sent = {}
    for count, step in ((full, 0), (steps - full, None)):
        for level, purposes in predicted_bytes(sharded, step).items() if count else ():
            of_level = sums.setdefault(level, {})
            for purpose, sent in purposes.items():
                of_level[purpose] = of_level.get(purpose, 0) + count * sent
    return sums


def _named(sharded: ShardedStates, sent: Bytes) -> Sent:
    names = sharded.world.cluster.level_names
    plain = {level: {purpose: n for purpose, n in sent[level].items() if purpose != CONTROL} for level in sent}
    return {names[level]: purposes for level, purposes in plain.items() if purposes}


def held_bytes(sharded: ShardedStates, state_numbers: int = 2) -> dict[str, int]:
    """state -> bytes on this rank; optimizer states are the masters, and `state_numbers` beside each (AdamW has two)."""
    sums = {"params": 0, "grads": 0, "master": 0}
    trained = 0
    for unit in sharded.units:
        for flat in unit.flats:
            for state, count in flat.held_bytes().items():
                sums[state] += count
            trained += flat.master.nbytes if flat.trained else 0
        sums["grads"] += sum(grads.nbytes for grads in unit.grads.values())
    return {"params": sums["params"], "grads": sums["grads"], "optimizer": sums["master"] + state_numbers * trained}


@dataclass(frozen=True)
class Uncompressed:
    """Of `of` numbers that this rank sums at a level per step, `numbers` travel without the codec that the plan names."""

    codec: str
    numbers: int
    of: int


def uncompressed(sharded: ShardedStates) -> dict[str, Uncompressed]:
    """level name -> what `lowrank` sums as it is there: what is no matrix, or too small to gain, and padding."""
    found: dict[str, Uncompressed] = {}
    for low_rank in (grads.low_rank for unit in sharded.units for grads in unit.grads.values()):
        if low_rank is not None:
            name = sharded.world.level_name(low_rank.level)
            before = found.get(name, Uncompressed("lowrank", 0, 0))
            found[name] = Uncompressed("lowrank", before.numbers + low_rank.uncoded, before.of + low_rank.numbers)
    return {name: counted for name, counted in found.items() if counted.numbers}


def idle_codecs(sharded: ShardedStates) -> dict[str, str]:
    """`weights.LEVEL` or `grads.LEVEL` -> the codec that the plan names there, where nothing of the kind is sent."""
    sent = predicted_bytes(sharded)
    return {
        f"{direction}.{level}": codec
        for direction, kind in (("weights", "P-"), ("grads", "G-"))
        for level, codec in getattr(sharded.plan.compression, direction).items()
        if codec != "fp32" and not any(purpose.startswith(kind) for purpose in sent.get(level, {}))
    }
