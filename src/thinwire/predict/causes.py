"""Seconds of one optimizer step by cause, of a step that has been simulated.

The causes add up to the step. Work is that of the busiest stage. What more a pipeline takes that moves no states and sends
at once is waiting for other stages, what sends add to that is theirs, and all the rest that is not the optimizer is the
data axis: each is the difference of two steps of which one has more to do, and so never negative.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from thinwire.predict.candidate import Candidate, Setting
from thinwire.predict.course import end_s
from thinwire.predict.placement import Axes
from thinwire.predict.step import Core, StageWork, optimizer_s, silent, stage_work


class Played(Protocol):
    """What is asked of a simulated step (`simulate.Simulated`)."""

    @property
    def step_s(self) -> float: ...

    @property
    def outer_s(self) -> float: ...

    @property
    def busy_s(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by cause. All but `hidden_s` add up to `total`."""

    matmul_s: float
    memory_s: float
    launch_s: float
    tensor_s: float
    context_s: float
    data_s: float
    """Collectives of the data axis that nothing hides, and compute's slowing down beside the hidden ones."""
    bubble_s: float
    send_s: float
    """Waiting for messages between pipeline stages."""
    optimizer_s: float
    outer_s: float
    """Stalls for outer rounds, spread over the steps between them."""
    hidden_s: float
    """Collectives that run behind compute."""

    @property
    def total(self) -> float:
        return (
            self.compute_s + self.tensor_s + self.context_s + self.data_s + self.bubble_s + self.send_s + self.optimizer_s
            + self.outer_s
        )  # fmt: skip

    @property
    def compute_s(self) -> float:
        return self.matmul_s + self.memory_s + self.launch_s


def causes(simulated: Played, setting: Setting, candidate: Candidate, axes: Axes, core: Core) -> StepTime:
    """The causes of a step that was simulated as computed, without perturbations."""
    works, times = stage_work(setting, candidate, axes, core), core.micro_batches
    stages = silent(core, candidate.chunks)
    busiest = max(works, key=lambda work: work.once.total)
    work_s = times * busiest.once.total
    alone, sending = (end_s(stages, micro_batches=times, send_s=each) for each in (0.0, core.send_s))
    optimizer = max(optimizer_s(setting, work.owned, axes) for work in works)
    data = simulated.step_s - simulated.outer_s - sending - optimizer
    return StepTime(
        matmul_s=busiest.once.matmul_s * times,
        memory_s=busiest.once.memory_s * times,
        launch_s=busiest.once.launch_s * times,
        tensor_s=busiest.once.tensor_s * times,
        context_s=busiest.once.context_s * times,
        data_s=max(0.0, data),
        bubble_s=max(0.0, alone - work_s),
        send_s=max(0.0, sending - alone),
        optimizer_s=optimizer,
        outer_s=simulated.outer_s,
        hidden_s=_hidden_s(simulated, setting, busiest, work_s + optimizer_s(setting, busiest.owned, axes), data),
    )


def _hidden_s(simulated: Played, setting: Setting, stage: StageWork, computed_s: float, data_s: float) -> float:
    """Seconds of a stage's collectives that run behind compute: all but those for which it waits.

    Of `data_s`, what its compute takes beyond `computed_s` is no waiting: work of its own, and slowing down.
    """
    busy = {lane: simulated.busy_s.get(f"{stage.equal.first}:{lane}", 0.0) for lane in setting.cluster.level_names}
    more_s = simulated.busy_s.get(f"{stage.equal.first}:compute", 0.0) - computed_s
    return max(0.0, sum(busy.values()) - max(0.0, data_s - more_s))
