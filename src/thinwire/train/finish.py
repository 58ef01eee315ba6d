"""The end of a start of a run: what it did in a table, a sample of what the model writes, how to go on."""

from contextlib import nullcontext

from thinwire.data.prompt import Prompt, chat_prompt, opening, text_prompt
from thinwire.data.tokenizer import Tokenizer
from thinwire.errors import DataError
from thinwire.hub.init import HUB
from thinwire.model.generate import generate
from thinwire.train.announce import compare, predicted_total
from thinwire.train.assemble import Parts
from thinwire.train.folder import EVENTS_FILE
from thinwire.train.job import Job
from thinwire.train.saving import Saver


def finish(job: Job, parts: Parts, saver: Saver, *, step: int, stopped: bool, by: str) -> None:
    """Show the summary; after a finished run a sample of text too, after a stop how to resume."""
    parts.sharded.drain()
    with parts.sync.outer_weights() if parts.sync is not None else nullcontext():
        text = None if stopped else sample(job, parts)
    reason = f"stopped by {by or 'another rank'}" if stopped else "finished"
    parts.event("run_end", step=step, reason=reason if saver.saved else f"{reason}, but not saved")
    if parts.telemetry is None:
        return
    rows = {"run folder": str(job.folder), "step": f"{step} of {job.config.run.steps}"}
    if saver.newest_name():
        rows["checkpoint"] = str(saver.newest_name())
    rows["steps and causes"] = str(job.folder / EVENTS_FILE)
    parts.telemetry.stop_line()
    parts.telemetry.show(parts.totals.table(rows))
    if parts.totals.wire:
        predicted = predicted_total(parts.sharded, step - parts.totals.steps, parts.totals.steps)
        parts.telemetry.show(compare(predicted, parts.totals.wire))
    if text is not None:
        parts.telemetry.console.rule("sample", align="left")
        parts.telemetry.console.print(text, markup=False, highlight=False)
        parts.telemetry.console.rule()
    if stopped and saver.saved:
        parts.say(f"stopped after step {step}; the same command goes on from there")


def sample(job: Job, parts: Parts) -> str | None:
    """Text the model writes after `run.sample_prompt`, or after the beginning of its data; None without a tokenizer.

    Of a corpus of conversations the prompt is a user's message. All ranks generate in step.
    """
    tokenizer, run = job.corpus.tokenizer, job.config.run
    if tokenizer is None or run.sample_tokens == 0:
        return None
    try:
        prompt = _prompt(job, tokenizer).fitting(job.spec.max_tokens // 2)
    except DataError as error:
        parts.warn(f"no sample: {error}")
        return None
    parts.model.eval()
    made = generate(
        parts.model,
        prompt.ids,
        max_new_tokens=min(run.sample_tokens, job.spec.max_tokens - len(prompt.ids)),
        max_tokens=job.spec.max_tokens,
        temperature=0.8,
        top_p=0.95,
        seed=run.seed,
        stop_ids=prompt.stop_ids,
    )
    ids = list(made)
    parts.model.train()
    return tokenizer.decode([*prompt.ids, *ids])


def _prompt(job: Job, tokenizer: Tokenizer) -> Prompt:
    text = job.config.run.sample_prompt
    if not text:
        return opening(job.corpus)
    if job.corpus.conversations:
        return chat_prompt(tokenizer, [job.config.data.path, job.folder / HUB], text)
    return text_prompt(tokenizer, text)
