"""What is said of a resumed run whose learning rate goes on otherwise than it began. No torch.

Steps that are done are not done again, so a run that was prolonged is not the run that had been as long from the start:
the schedule of the new length would have given some of its steps another rate, and the reader is told which.
"""

from thinwire.train.config import RunConfig
from thinwire.train.schedule import lr_at

_LISTED = 1_000_000
"""Steps that are looked at, from the newest back."""


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
    return [step + 1 for step in range(first, done) if abs(_share(old, step) - _share(new, step)) > 1e-12]


def _span(steps: list[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    whole = steps[-1] - steps[0] + 1 == len(steps)
    return f"steps {steps[0]} to {steps[-1]}" if whole else f"{len(steps)} of the steps {steps[0]} to {steps[-1]}"


def _rate(config: RunConfig, step: int) -> float:
    return config.optimizer.lr * _share(config, step)


def _share(config: RunConfig, step: int) -> float:
    return lr_at(step, peak=1.0, total_steps=config.run.steps, schedule=config.schedule)
