"""Branch and bound: cores in the order of their lower bounds, partitions only of those that may still win.

A core's lower bound is its step without any communication of the data axis; a partition's is also that no link can carry
its bytes in less time. States sharded over everything are the lower bound of memory. Nothing that could be among the best
`keep` is ever left out; a test compares with plain enumeration.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from thinwire.errors import PlanError
from thinwire.planner.space import COMPRESSION, Space, cores, partitions, with_codecs
from thinwire.predict.block import Passes
from thinwire.predict.candidate import Candidate, Setting
from thinwire.predict.overlap import Chain, UnitMoves, added
from thinwire.predict.peak_memory import Memory, peak_memory
from thinwire.predict.pipeline import StageKind, parameters_of
from thinwire.predict.placement import Axes, check_device, place
from thinwire.predict.sent import unit_moves
from thinwire.predict.step import Core, StepTime, all_passes, core_of, pipeline_alone, step_time


@dataclass(frozen=True)
class Ranked:
    """A candidate that fits, with its prediction."""

    candidate: Candidate
    axes: Axes
    time: StepTime
    memory: Memory
    simulated_s: float | None = None
    """The step simulated with an event queue, for finalists."""

    @property
    def step_s(self) -> float:
        """The best estimate there is."""
        return self.time.total if self.simulated_s is None else self.simulated_s


@dataclass
class SearchResult:
    """What a search came to."""

    best: list[Ranked] = field(default_factory=list)
    """The fastest candidates that fit, fastest first."""
    closest: Ranked | None = None
    """Of those that do not fit, the one that needs least memory."""
    cores: int = 0
    costed: int = 0

    def limit(self, keep: int) -> float:
        """A step has to be shorter than this to be among the best `keep`."""
        return self.best[-1].time.total if len(self.best) >= keep else float("inf")


class Passing:
    """Passes of blocks and ends, which many cores share."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._known: dict[tuple[object, ...], tuple[Passes, Passes, Passes]] = {}

    def of(self, candidate: Candidate, axes: Axes) -> tuple[Passes, Passes, Passes]:
        key = (
            candidate.tensor,
            candidate.context,
            candidate.micro_batch,
            candidate.recompute,
            candidate.recompute_every,
        )
        if key not in self._known:
            self._known[key] = all_passes(self._setting, candidate, axes)
        return self._known[key]


def search(setting: Setting, space: Space, *, keep: int = 20) -> SearchResult:
    """The `keep` fastest candidates that fit. Raises ConfigError if figures are missing, PlanError if nothing divides."""
    check_device(setting.cluster.device)
    found = SearchResult()
    waiting = sorted(_bounded(setting, space, found), key=lambda item: item[0])
    if not waiting:
        raise PlanError(_nothing_divides(setting, space))
    tried = _Partitions(setting, space, found, keep)
    too_large: list[tuple[Candidate, Axes]] = []
    for least, candidate, axes, passes in waiting:
        limit = found.limit(keep)
        if least >= limit:
            break
        if not _may_fit(setting, candidate, axes):
            too_large.append((candidate, axes))
            continue
        core = core_of(setting, candidate, axes, passes)
        if tried.least_traffic(candidate, axes, core) < limit:
            tried.expand(candidate, axes, core)
    if not found.best:
        found.closest = _closest(setting, too_large)
    return found


def _bounded(
    setting: Setting, space: Space, found: SearchResult
) -> Iterator[tuple[float, Candidate, Axes, tuple[Passes, Passes, Passes]]]:
    """Cores with their lower bounds."""
    passing = Passing(setting)
    placed: dict[tuple[tuple[int, int, int], bool], Axes | None] = {}
    for candidate in cores(setting, space):
        if not space.allows(candidate):
            continue
        found.cores += 1
        shape = (candidate.tensor, candidate.context, candidate.pipeline)
        if (shape, candidate.pipeline_outside) not in placed:
            placed[shape, candidate.pipeline_outside] = _place(setting, candidate)
        axes = placed[shape, candidate.pipeline_outside]
        if not candidate.pipeline_outside and axes == placed[shape, True]:
            continue  # both orders lie on the same levels
        if axes is not None:
            passes = passing.of(candidate, axes)
            yield pipeline_alone(setting, candidate, axes, passes).total, candidate, axes, passes


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


def _closest(setting: Setting, too_large: list[tuple[Candidate, Axes]]) -> Ranked | None:
    """What needs least memory of all that does not fit."""
    pairs = [(each, axes) for candidate, axes in too_large for each in _sparsest(candidate, axes)]
    if not pairs:
        return None
    candidate, axes = min(pairs, key=lambda pair: peak_memory(setting, pair[0], pair[1]).total)
    return Ranked(candidate, axes, step_time(setting, candidate, axes), peak_memory(setting, candidate, axes))


class _Partitions:
    """Partitions and codecs of one core after another. What the units of one send is counted once, however many cores have
    it."""

    def __init__(self, setting: Setting, space: Space, found: SearchResult, keep: int) -> None:
        self._setting, self._space, self._found, self._keep = setting, space, found, keep
        self._moves: dict[tuple[object, ...], UnitMoves] = {}

    def least_traffic(self, candidate: Candidate, axes: Axes, core: Core) -> float:
        """No partition sends less than one reduction and one gather at every level, under the smallest codec there is."""
        outermost = max((hop.level for hop in axes.states), default=-1)
        partition = replace(candidate, depths=(-1, -1, outermost))
        every = [partition, *with_codecs(self._setting, self._space, partition, axes)]
        return min(self._least_on_links(each, axes, core) for each in every)

    def expand(self, core_candidate: Candidate, axes: Axes, core: Core) -> None:
        """Cost the core's partitions that may still be among the best, and keep those that are."""
        setting, found, keep = self._setting, self._found, self._keep
        capacity = setting.cluster.device.memory_bytes
        assert capacity
        hopeful = sorted(
            (
                (self._least_on_links(each, axes, core), each)
                for each in partitions(setting, self._space, core_candidate, axes)
                if self._space.allows(each, partition=True)
            ),
            key=lambda pair: pair[0],
        )
        memories: dict[tuple[object, ...], Memory] = {}
        for least, candidate in hopeful:
            limit = found.limit(keep)
            if least >= limit:
                break
            partition = (candidate.depths, candidate.keep_gathered)
            if partition not in memories:
                memories[partition] = peak_memory(setting, candidate, axes)
            memory = memories[partition]
            if not memory.fits(capacity):
                continue
            time = step_time(setting, candidate, axes, core)
            found.costed += 1
            if time.total < limit:
                found.best.append(Ranked(candidate, axes, time, memory))
                found.best.sort(key=lambda ranked: (ranked.time.total, ranked.memory.total))
                del found.best[keep:]

    def _least_on_links(self, candidate: Candidate, axes: Axes, core: Core) -> float:
        """A lower bound from what the first stage's blocks send; no stage has more of them.

        No stream is done sooner than its bytes take. The last reduction hides behind one backward at most, and new weights
        behind one forward: the first stage is the last to end and the first to begin.
        """
        first = core.stages[0].kind
        elements = parameters_of(self._setting, first, candidate.tensor)["block"] * first.blocks
        moves = self._moves_of(elements, candidate, axes)
        gathers = 0 if not moves.gather else core.micro_batches * (1 if candidate.keep_gathered else 2)
        chains = (
            (moves.gather, gathers),
            (moves.reduce_each, core.micro_batches - 1),
            (moves.reduce_last, 1),
            (moves.refresh, 1),
        )
        sent = added([tuple((level, times * seconds) for level, seconds in chain) for chain, times in chains])
        passes = (core.block, core.embedding, core.head)
        ends = max(0.0, _slowest(moves.reduce_last) - _alone(first, [each.backward.total for each in passes]))
        ends += max(0.0, _slowest(moves.refresh) - _alone(first, [each.forward.total for each in passes]))
        return max(max((seconds for _, seconds in sent), default=0.0), core.least_s + ends)

    def _moves_of(self, elements: float, candidate: Candidate, axes: Axes) -> UnitMoves:
        partition = (candidate.depths, candidate.keep_gathered, candidate.weights, candidate.grads)
        key = (elements, axes.states, *partition)
        if key not in self._moves:
            self._moves[key] = unit_moves(elements, self._setting, candidate, axes.states)
        return self._moves[key]


def _slowest(chain: Chain) -> float:
    """Seconds of the level that a chain occupies longest."""
    return max((seconds for _, seconds in added([chain])), default=0.0)


def _alone(kind: StageKind, seconds: list[float]) -> float:
    """Seconds of a pass through a stage of this kind, from those of a block, the embedding and the head."""
    block, embedding, head = seconds
    return kind.blocks * block + kind.first * embedding + kind.last * head


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
