"""Outer synchronisation: what a round sends, how long the groups stall for it, and what rate would hide it.

DiLoCo (arXiv 2311.08105) sends the full pseudo-gradient once in H steps; Streaming DiLoCo (2501.18512) one of F
fragments every H / F steps, behind the next `overlap_steps` steps. An all-reduce among M groups moves 2 (M - 1) / M of a
fragment through each group's link.
"""

from dataclasses import dataclass

from thinwire.plan.compression import wire_bytes
from thinwire.predict.candidate import CandidateSync, Setting
from thinwire.predict.placement import rate_of

BLOCK = 128


@dataclass(frozen=True)
class OuterRound:
    """One outer synchronisation of one fragment, seen from one group."""

    every_steps: float
    """Inner steps from one fragment's send to the next one's."""
    sent_bytes: float
    """Through a group's link."""
    travel_s: float
    stall_s: float
    """What the allowed overlap does not hide."""

    @property
    def stall_per_step_s(self) -> float:
        return self.stall_s / self.every_steps


def fragment_bytes(parameters: float, sync: CandidateSync) -> float:
    """Bytes of a fragment as it travels."""
    return float(wire_bytes(sync.codec, round(parameters / sync.fragments), block=BLOCK, element_bytes=4))


def outer_round(setting: Setting, sync: CandidateSync, step_s: float) -> OuterRound:
    """A round when an inner step takes `step_s`.

    Groups, or places in which they add up first, exchange with each other directly. The link of a level's member carries
    what all senders inside it send to those outside; messages are all under way at once, so the slowest link decides.
    """
    cluster, senders = setting.cluster, sync.senders(setting.cluster)
    each = 2 * fragment_bytes(float(setting.parameters), sync) / senders  # to one other sender, there and back
    slowest, latency_s, inside = 0.0, 0.0, 1
    for index, peers in enumerate(sync.peers(cluster), sync.level):
        if peers:
            through = inside * (senders - inside) * each
            slowest = max(slowest, through / rate_of(cluster, index, setting.calibration))
            latency_s += 2 * peers // inside * (cluster.levels[index].latency_s or 0.0)
        inside += peers
    travel = slowest + latency_s + _inside_s(setting, sync)
    return OuterRound(sync.inner_steps / sync.fragments, (senders - 1) * each, travel, stall_s(travel, step_s, sync))


def _inside_s(setting: Setting, sync: CandidateSync) -> float:
    """Seconds in which groups that add up do so, in fp32, and share what comes out."""
    if sync.said is None or sync.said.sum_inside is None:
        return 0.0
    level = setting.cluster.index(sync.said.sum_inside)
    moved = 2 * 4 * setting.parameters / sync.fragments * (sync.summed - 1) / sync.summed
    return moved / rate_of(setting.cluster, level, setting.calibration)


def stall_s(travel_s: float, step_s: float, sync: CandidateSync) -> float:
    """Seconds the groups wait for a fragment."""
    return max(0.0, travel_s - sync.overlap_steps * step_s)


def rate_for_utilisation(
    wanted: float, *, parameters: float, groups: int, step_s: float, sync: CandidateSync | None, latency_s: float = 0.0
) -> float:
    """Bytes per second of each group's link at which compute takes the share `wanted` of the time.

    Without `sync` it is data parallelism in bf16: an all-reduce a step with nothing to hide behind.
    """
    plain = sync or CandidateSync(level=0, inner_steps=1)
    sent = 2 * (groups - 1) / groups * fragment_bytes(parameters, plain)
    every = plain.inner_steps / plain.fragments
    allowed = every * step_s * (1 / wanted - 1) + plain.overlap_steps * step_s - 2 * (groups - 1) * latency_s
    return sent / allowed if allowed > 0 else float("inf")
