"""Best first: whatever may be the fastest is looked at more closely, until it is simulated.

Every candidate has a lower bound of its simulated step, at first a cheap one of its core (axes, micro-batch, recomputation),
then sharper ones: the pipeline without communication of the data axis, what each partition's bytes take on every link, and
`bound.py`. The one with the least bound is next. So candidates come in the order of their sharpest bounds, and once the best
simulated step is below the next bound, nothing that has not been simulated can be faster. A test compares with plain
enumeration. States sharded over everything are the lower bound of memory.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from math import inf
from typing import Any

import numpy as np

from thinwire.errors import PlanError
from thinwire.planner.link_bounds import LinkBounds
from thinwire.planner.space import COMPRESSION, Space, cores
from thinwire.predict.block import Passes
from thinwire.predict.bound import least_s, roughly_s
from thinwire.predict.candidate import Candidate, Setting
from thinwire.predict.causes import StepTime, causes
from thinwire.predict.course import course
from thinwire.predict.peak_memory import Memory, peak_memory
from thinwire.predict.placement import Axes, check_device, place
from thinwire.predict.simulate import simulate_step
from thinwire.predict.step import Core, all_passes, core_of, silent, silent_kinds

MOST_UNITS = 300_000
"""Micro-batches times blocks, over all simulated candidates, after which no other one is: some seconds."""


@dataclass(frozen=True)
class Ranked:
    """A candidate that fits, with its prediction."""

    candidate: Candidate
    axes: Axes
    time: StepTime
    """The simulated step by cause."""
    memory: Memory


@dataclass(frozen=True)
class Hopeful:
    """A candidate that fits, and what its step takes at least."""

    least_s: float
    candidate: Candidate
    axes: Axes
    core: Core
    memory: Memory


@dataclass
class SearchResult:
    """What a search came to."""

    best: list[Ranked] = field(default_factory=list)
    """The fastest of the candidates that fit and were simulated, fastest first."""
    rest: list[Hopeful] = field(default_factory=list)
    """Of those that were not simulated, the ones with the least bounds."""
    closest: tuple[Candidate, Axes, Memory] | None = None
    """Of those that do not fit, the one that needs least memory."""
    cores: int = 0
    fitting: int = 0
    """Candidates that were found to fit, and whose sharpest bounds were taken."""
    simulated: int = 0

    @property
    def unseen_s(self) -> float:
        """No candidate that was not simulated takes less."""
        return self.rest[0].least_s if self.rest else inf

    @property
    def proven(self) -> bool:
        """Whether no candidate that fits can be simulated to be faster than the first."""
        return not self.best or self.best[0].time.total <= self.unseen_s


@dataclass(frozen=True)
class Choice:
    """What was found; `outer` has plans with outer synchronisation, if they were looked for."""

    every_step: SearchResult
    outer: SearchResult | None

    @property
    def best(self) -> Ranked:
        found = self.outer if self.outer is not None and self.outer.best else self.every_step
        return found.best[0]


def busy(ranked: Ranked) -> float:
    """Share of the step that is compute."""
    return ranked.time.compute_s / ranked.time.total


class Passing:
    """Passes of blocks and ends, which many cores share."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._known: dict[tuple[object, ...], tuple[Passes, Passes, Passes]] = {}

    def of(self, candidate: Candidate, axes: Axes) -> tuple[Passes, Passes, Passes]:
        key = (
            candidate.tensor,
            candidate.context,
            candidate.pipeline == 1,
            candidate.micro_batch,
            candidate.recompute,
            candidate.recompute_every,
        )
        if key not in self._known:
            self._known[key] = all_passes(self._setting, candidate, axes)
        return self._known[key]


def search(setting: Setting, space: Space, *, keep: int = 20, most_units: float = MOST_UNITS) -> SearchResult:
    """The fastest candidate that fits, and up to `keep` - 1 that come next, as far as they were looked at.

    Raises ConfigError if figures are missing, PlanError if nothing divides.
    """
    found = SearchResult()
    units = 0
    for hopeful in in_order(setting, space, found):
        shown = len(found.best) + len(found.rest)
        if found.rest or (found.best and (found.best[0].time.total <= hopeful.least_s or units >= most_units)):
            found.rest.append(hopeful)
            if shown + 1 >= keep:
                break
            continue
        units += hopeful.core.micro_batches * setting.spec.layers
        time = step_time(setting, hopeful.candidate, hopeful.axes, hopeful.core)
        found.simulated += 1
        found.best.append(Ranked(hopeful.candidate, hopeful.axes, time, hopeful.memory))
        found.best.sort(key=lambda ranked: (ranked.time.total, ranked.memory.total))
        del found.best[keep:]
    return found


def fits(setting: Setting, space: Space) -> bool:
    """Whether anything fits. Raises as `search` does."""
    return next(in_order(setting, space, SearchResult()), None) is not None


def in_order(setting: Setting, space: Space, found: SearchResult) -> Iterator[Hopeful]:
    """All candidates that fit, in the order of their lower bounds; `found` gets the counts, and what is closest to fit."""
    check_device(setting.cluster.device)
    order = _Order(setting, space, found)
    if not order.waiting:
        raise PlanError(_nothing_divides(setting, space))
    fitting = False
    for hopeful in order.run():
        fitting = True
        yield hopeful
    if not fitting:
        found.closest = _closest(setting, order.too_large)


Look = Callable[[], "Hopeful | None"]


class _Order:
    """A queue of what may be looked at more closely, least bound first; each look puts what came of it back."""

    def __init__(self, setting: Setting, space: Space, found: SearchResult) -> None:
        self._setting, self._space, self._found = setting, space, found
        self._number = count()
        self._links = LinkBounds(setting, space)
        self.too_large: list[tuple[Candidate, Axes]] = []
        self.waiting: list[tuple[float, int, Look]] = []
        self._fill()

    def run(self) -> Iterator[Hopeful]:
        while self.waiting:
            _, _, look = heapq.heappop(self.waiting)
            hopeful = look()
            if hopeful is not None:
                yield hopeful

    def _put(self, least_s: float, look: Look) -> None:
        heapq.heappush(self.waiting, (least_s, next(self._number), look))

    def _fill(self) -> None:
        """Every core, with the bound that costs least."""
        setting, passing = self._setting, Passing(self._setting)
        placed: dict[tuple[tuple[int, int, int], bool], Axes | None] = {}
        for candidate in cores(setting, self._space):
            if not self._space.allows(candidate):
                continue
            self._found.cores += 1
            shape = (candidate.tensor, candidate.context, candidate.pipeline)
            if (shape, candidate.pipeline_outside) not in placed:
                placed[shape, candidate.pipeline_outside] = _place(setting, candidate)
            axes = placed[shape, candidate.pipeline_outside]
            if not candidate.pipeline_outside and axes == placed[shape, True]:
                continue  # both orders lie on the same levels
            if axes is None:
                continue
            core = core_of(setting, candidate, axes, passing.of(candidate, axes))
            least = max(
                roughly_s(core, silent_kinds(core, candidate.chunks)), self._links.least_s(candidate, axes, core)
            )
            self._put(least, partial(self._core, candidate, axes, core))

    def _core(self, candidate: Candidate, axes: Axes, core: Core) -> None:
        if not _may_fit(self._setting, candidate, axes):
            self.too_large.append((candidate, axes))
            return
        stages = silent(core, candidate.chunks)
        alone = course(stages, micro_batches=core.micro_batches, send_s=core.send_s)
        choices = self._links.choices(candidate, axes, core)
        if choices.fields:
            bounds = choices.bounds(core, stages[0], alone.last_s[0])
            order = np.argsort(-bounds, kind="stable").tolist()
            self._next(_Opened(candidate, axes, core, choices.fields, bounds.tolist(), order))

    def _next(self, opened: "_Opened") -> None:
        if opened.order:
            index = opened.order.pop()
            self._put(opened.bounds[index], partial(self._partition, opened, index))

    def _partition(self, opened: "_Opened", index: int) -> None:
        self._next(opened)
        candidate = replace(opened.candidate, **opened.fields[index])
        partition = (candidate.depths, candidate.keep_gathered)
        if partition not in opened.memories:
            opened.memories[partition] = peak_memory(self._setting, candidate, opened.axes)
        memory, capacity = opened.memories[partition], self._setting.cluster.device.memory_bytes
        assert capacity
        if not memory.fits(capacity):
            return
        self._found.fitting += 1
        least = max(opened.bounds[index], least_s(self._setting, candidate, opened.axes, opened.core))
        hopeful = Hopeful(least, candidate, opened.axes, opened.core, memory)
        self._put(least, lambda: hopeful)


@dataclass
class _Opened:
    """A core whose partitions are looked at one by one, the last in `order` next."""

    candidate: Candidate
    axes: Axes
    core: Core
    fields: list[dict[str, Any]]
    bounds: list[float]
    order: list[int]
    memories: dict[tuple[object, ...], Memory] = field(default_factory=dict)


def _place(setting: Setting, candidate: Candidate) -> Axes | None:
    try:
        return place(candidate, setting.cluster, setting.calibration)
    except PlanError:
        return None


def _sparsest(candidate: Candidate, axes: Axes) -> list[Candidate]:
    """Partitions of which one needs least memory: everything sharded, or parameters and gradients unsharded (no units
    besides)."""
    outermost = max((hop.level for hop in axes.states), default=-1)
    return [replace(candidate, depths=(lp, lp, outermost)) for lp in (outermost, -1)]


def _may_fit(setting: Setting, candidate: Candidate, axes: Axes) -> bool:
    capacity = setting.cluster.device.memory_bytes
    assert capacity
    return any(peak_memory(setting, each, axes).fits(capacity) for each in _sparsest(candidate, axes))


def _closest(setting: Setting, too_large: list[tuple[Candidate, Axes]]) -> tuple[Candidate, Axes, Memory] | None:
    """What needs least memory of all that does not fit."""
    every = [
        (each, axes, peak_memory(setting, each, axes))
        for candidate, axes in too_large
        for each in _sparsest(candidate, axes)
    ]
    return min(every, key=lambda item: item[2].total, default=None)


def _nothing_divides(setting: Setting, space: Space) -> str:
    ranks, sequences = setting.cluster.ranks, setting.sequences
    share = max(1, round(sequences / ranks)) * ranks
    what = "data-parallel plans" if space.runnable else "plans"
    if share == sequences:  # they do divide: what is decided does not go with them
        decided = ", ".join(
            f"{name} = {value}" for name, value in space.fixed.items() if name not in ("depths", *COMPRESSION)
        )
        return (
            f"no {what} divide {sequences} sequences of {setting.tokens} tokens over {ranks} ranks with "
            f"{decided or 'what [plan] decides'}; leave that open, or change it"
        )
    return (
        f"no {what} divide {sequences} sequences of {setting.tokens} tokens over {ranks} ranks; try batch.sequences = "
        f"{share}"
    )


def step_time(setting: Setting, candidate: Candidate, axes: Axes, core: Core | None = None) -> StepTime:
    """Simulate one step; its seconds by cause."""
    simulated = simulate_step(setting, candidate, axes, keep_spans=False)
    return causes(simulated, setting, candidate, axes, core or core_of(setting, candidate, axes))


def cost(setting: Setting, candidate: Candidate) -> Ranked:
    """One candidate's prediction. Raises PlanError if it does not divide the levels or the batch."""
    if candidate.accumulate(setting) == 0:
        share = candidate.data(setting.cluster) * candidate.groups(setting.cluster) * candidate.micro_batch
        if share == 0:
            raise PlanError(f"tensor x context x pipeline does not divide the cluster's {setting.cluster.ranks} ranks")
        raise PlanError(
            f"{setting.sequences} sequences do not divide into micro-batches of {candidate.micro_batch} on "
            f"{share // candidate.micro_batch} data-parallel ranks; try batch.sequences = {share}"
        )
    axes = place(candidate, setting.cluster, setting.calibration)
    core = core_of(setting, candidate, axes)
    return Ranked(candidate, axes, step_time(setting, candidate, axes, core), peak_memory(setting, candidate, axes))
