"""What a link is worth: the rate at which another plan becomes the best, and the rate that keeps the devices busy.

Flips are looked for by a full search at each rate; between two rates with different answers the place is found by
halving. Utilisation is the share of a step's lower bound that is compute. Schemes across the outermost level: the plan
as it is, DiLoCo, and Streaming DiLoCo with and without e3m0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from thinwire.planner.search import Ranked, search
from thinwire.planner.space import Space, shape_of, show_axes, show_states
from thinwire.predict.bound import least_s
from thinwire.predict.candidate import Candidate, CandidateSync, Setting
from thinwire.predict.outer_cost import rate_for_utilisation
from thinwire.predict.placement import place
from thinwire.predict.step import core_of
from thinwire.units import show_rate

SHARES = (0.5, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Flip:
    """At `bytes_per_s` of `level`, `other` becomes the best."""

    level: str
    bytes_per_s: float
    other: Ranked


@dataclass(frozen=True)
class Needed:
    """Rates of the outermost level's link, for each of SHARES; none: latency alone is too much."""

    scheme: str
    bytes_per_s: tuple[float | None, ...]


def with_rate(setting: Setting, level: int, bytes_per_s: float) -> Setting:
    """The setting with another rate at `level`."""
    levels = list(setting.cluster.levels)
    levels[level] = levels[level].model_copy(update={"bytes_per_s": bytes_per_s})
    cluster = setting.cluster.model_copy(update={"levels": tuple(levels)})
    return replace(setting, cluster=cluster)


def flips(setting: Setting, space: Space, best: Ranked, *, factor: float = 4.0, halvings: int = 4) -> list[Flip]:
    """For each level, the nearest rates below and above (within `factor`) at which the best plan is another one."""
    found = []
    for index, level in enumerate(setting.cluster.levels):
        if level.fanout == 1 or level.bytes_per_s is None:
            continue
        for far in (1 / factor, factor):
            flip = _flip(setting, space, best, index, level.bytes_per_s, level.bytes_per_s * far, halvings)
            if flip is not None:
                found.append(flip)
    return found


def _flip(
    setting: Setting, space: Space, best: Ranked, index: int, near: float, far: float, halvings: int
) -> Flip | None:
    def answer(rate: float) -> Ranked:
        return search(with_rate(setting, index, rate), space, keep=1).best[0]

    other = answer(far)
    if shape_of(other.candidate) == shape_of(best.candidate):
        return None
    for _ in range(halvings):
        middle = (near * far) ** 0.5
        between = answer(middle)
        if shape_of(between.candidate) == shape_of(best.candidate):
            near = middle
        else:
            far, other = middle, between
    return Flip(setting.cluster.levels[index].name, far, other)


def needed(setting: Setting, best: Ranked, *, inner_steps: int = 100) -> list[Needed]:
    """Rates of the outermost level for the shares of compute, per synchronisation scheme."""
    last = len(setting.cluster.levels) - 1
    groups = setting.cluster.levels[last].fanout
    if groups == 1:
        return []
    plain, step_s = replace(best.candidate, sync=None), best.time.compute_s
    rows = [Needed("the best plan, every step", tuple(_rate(setting, plain, last, share, step_s) for share in SHARES))]
    fragments = max(1, setting.spec.layers // 3)
    for name, sync in (
        ("DiLoCo, bf16", CandidateSync(last, inner_steps)),
        ("Streaming DiLoCo, bf16, behind 1 step", CandidateSync(last, inner_steps, fragments, 1)),
        ("Streaming DiLoCo, e3m0, behind 1 step", CandidateSync(last, inner_steps, fragments, 1, "e3m0")),
    ):
        latency = setting.cluster.levels[last].latency_s or 0.0
        rates = [
            rate_for_utilisation(
                share, parameters=float(setting.parameters), groups=groups, step_s=step_s, sync=sync, latency_s=latency
            )
            for share in SHARES
        ]
        rows.append(Needed(name, tuple(None if rate == float("inf") else rate for rate in rates)))
    return rows


def _rate(setting: Setting, candidate: Candidate, level: int, share: float, compute_s: float) -> float | None:
    """The rate at which compute is `share` of what the step takes at least; none if no rate is enough."""

    def busy(rate: float) -> float:
        given = with_rate(setting, level, rate)
        axes = place(candidate, given.cluster, given.calibration)
        return compute_s / least_s(given, candidate, axes, core_of(given, candidate, axes))

    return lowest(lambda rate: busy(rate) >= share)


def lowest(enough: Callable[[float], bool], low: float = 1e4, high: float = 1e15) -> float | None:
    """The least value for which `enough` holds, to 1%; none if not even `high` is. `enough` must be monotone."""
    if not enough(high):
        return None
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def show_needed(rows: Sequence[Needed], setting: Setting) -> list[str]:
    """Rates for shares of compute, as a table."""
    if not rows:
        return []
    level = setting.cluster.levels[-1].name
    head = f"rate of a {level} link for compute to be" + "".join(f"{share:>13.0%}" for share in SHARES)
    lines = [head]
    for row in rows:
        cells = "".join(f"{show_rate(rate) if rate else 'never':>13}" for rate in row.bytes_per_s)
        lines.append(f"  {row.scheme:<{len(head) - 13 * len(SHARES) - 2}}{cells}")
    if any(rate is None for row in rows for rate in row.bytes_per_s):
        lines.append("  never: latency, or causes that this link has no part in, already take more")
    return lines


def show_flips(flips: Sequence[Flip], setting: Setting) -> list[str]:
    """Where another plan becomes the best."""
    if not flips:
        return ["the best plan stays the best when any one level is four times slower or faster"]
    lines = []
    for flip in flips:
        now = setting.cluster.levels[setting.cluster.index(flip.level)].bytes_per_s
        assert now
        other = flip.other.candidate
        lines.append(
            f"at {show_rate(flip.bytes_per_s)} on {flip.level} (now {show_rate(now)}) the best becomes "
            f"{show_axes(other, setting)} {other.recompute} recompute, {show_states(other, setting)}"
        )
    return lines
