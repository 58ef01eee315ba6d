"""Learning rate as a pure function of the step: linear warm-up, then cosine, linear, constant or warm-up/stable/decay.

Cosine: arXiv 1608.03983 without restarts. WSD: arXiv 2404.06395 (MiniCPM), with a linear decay.

Steps that are done are not done again, so a run that was prolonged is not the run that had been as long from the start:
the schedule of the new length would have given some of its steps another rate, and the reader is told which.
"""

import math

from thinwire.train.config import RunConfig, ScheduleConfig

_LISTED = 1_000_000
"""Steps that are looked at, from the newest back."""


def lr_at(step: int, *, peak: float, total_steps: int, schedule: ScheduleConfig) -> float:
    """The learning rate that step `step` (0 is the first) uses."""
    warmup = schedule.warmup(total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    span = max(1, total_steps - warmup)
    done = min(1.0, (step - warmup) / span)
    return peak * _share(done, schedule)


def _share(done: float, schedule: ScheduleConfig) -> float:
    """Share of the peak when `done` (0..1) of the steps after warm-up are over."""
    low = schedule.final_ratio
    if schedule.kind == "cosine":
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
    if schedule.kind == "linear":
        return 1 - (1 - low) * done
    if schedule.kind == "wsd":
        over = max(0.0, done - (1 - schedule.decay_fraction)) / schedule.decay_fraction
        return 1 - (1 - low) * over
    return 1.0


def said_of_changes(old: RunConfig, new: RunConfig, done: int) -> tuple[str, ...]:
    """Sentences about `run.steps` and `optimizer.lr` of a run that goes on after step `done` under `new`."""
    said = []
    if old.optimizer.lr != new.optimizer.lr:
        said.append(f"optimizer.lr was {old.optimizer.lr:g}, it is {new.optimizer.lr:g} from step {done + 1} on")
    if old.run.steps != new.run.steps and 0 < done < new.run.steps and (moved := _moved(old, new, done)):
        said.append(
            f"run.steps was {old.run.steps}, now {new.run.steps}, which moves the schedule: {_span(moved)} had a learning "
            f"rate that a run of {new.run.steps} steps would not have given {'it' if len(moved) == 1 else 'them'}; step "
            f"{done} had lr {_rate(old, done - 1):.3e} (there {_rate(new, done - 1):.3e}), step {done + 1} takes "
            f"{_rate(new, done):.3e}"
        )
    return tuple(said)


def _moved(old: RunConfig, new: RunConfig, done: int) -> list[int]:
    """Steps (1 is the first) whose rate, as a share of the peak, the two schedules disagree about."""
    first = max(0, done - _LISTED)
    return [step + 1 for step in range(first, done) if abs(_of_run(old, step) - _of_run(new, step)) > 1e-12]


def _span(steps: list[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    whole = steps[-1] - steps[0] + 1 == len(steps)
    return f"steps {steps[0]} to {steps[-1]}" if whole else f"{len(steps)} of the steps {steps[0]} to {steps[-1]}"


def _rate(config: RunConfig, step: int) -> float:
    return config.optimizer.lr * _of_run(config, step)


def _of_run(config: RunConfig, step: int) -> float:
    return lr_at(step, peak=1.0, total_steps=config.run.steps, schedule=config.schedule)
