"""`[compute]` of a run whose compute is emulated: seconds of its units on its device, as the planner predicts them."""

import json
from collections.abc import Sequence
from dataclasses import replace

from thinwire.cluster.hardware import calibration_of
from thinwire.config import show_text
from thinwire.errors import ConfigError
from thinwire.predict.candidate import Candidate, Setting, thinwire_with
from thinwire.predict.placement import Axes, check_device, touch_s
from thinwire.predict.step import OPTIMIZER_BYTES, all_passes
from thinwire.train.config import ComputeConfig
from thinwire.train.job import Job, refuse_emulating
from thinwire.units import whole_number

_NOWHERE = Axes((), (), (), (), ())
"""No axis crosses a link: what is left of a pass is compute."""


def emulated_compute(job: Job, slow: Sequence[str] = ()) -> ComputeConfig:
    """The table for `job`, with `slow` as `RANK=FACTOR`. Raises ConfigError: an unknown model, a device without figures."""
    spec, cluster, batch = refuse_emulating(job.spec), job.cluster, job.config.batch
    check_device(cluster.device)
    calibration = calibration_of(cluster)
    framework, dtype = thinwire_with(job.config.optimizer), job.plan.compute_dtype
    setting = Setting(spec, cluster, batch.sequences, batch.tokens, framework, calibration, dtype)
    candidate = replace(Candidate.of_plan(job.plan, spec.layers), recompute="none")  # the run recomputes by itself
    pairs = ((each.forward.total, each.backward.total) for each in all_passes(setting, candidate, _NOWHERE))
    block, embedding, head = ((_rounded(forward), _rounded(backward)) for forward, backward in pairs)
    each = calibration.optimizer_s
    return ComputeConfig(
        embedding=embedding,
        block=block,
        head=head,
        update=_rounded(touch_s(OPTIMIZER_BYTES, setting) if each is None else each),
        slow=factors(slow, cluster.ranks),
        source=f"{calibration.origin}: {calibration.source}",
    )


def factors(slow: Sequence[str], ranks: int) -> tuple[float, ...]:
    """`["3=1.5"]` -> a factor for each rank; none if none is slow. Raises ConfigError."""
    found = dict[int, float]()
    for text in slow:
        rank, factor = _factor(text)
        if rank >= ranks:
            raise ConfigError(f"--slow {text} names rank {rank}, but there are {ranks}, numbered from 0")
        if rank in found:
            raise ConfigError(f"--slow names rank {rank} twice; give it once")
        found[rank] = factor
    return tuple(found.get(rank, 1.0) for rank in range(ranks)) if found else ()


def _factor(text: str) -> tuple[int, float]:
    name, equals, number = text.partition("=")
    rank = whole_number(name)
    try:
        factor = float(number)
    except ValueError:
        factor = -1.0
    if not equals or rank is None or not 0 < factor <= 1e6:
        raise ConfigError(f"--slow {show_text(text)} is not RANK=FACTOR, for example 3=1.5")
    return rank, factor


def setting_of(compute: ComputeConfig) -> str:
    """The same as `--set` takes it."""
    fields = compute.model_dump(mode="json")
    return f"compute={{{', '.join(f'{key} = {json.dumps(value)}' for key, value in fields.items())}}}"


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.6g}")
