"""Learning rate as a pure function of the step: linear warm-up, then cosine, linear, constant or warm-up/stable/decay.

Cosine: arXiv 1608.03983 without restarts. WSD: arXiv 2404.06395 (MiniCPM), with a linear decay.
"""

import math

from thinwire.train.config import ScheduleConfig


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
