"""Device memory of a stage's ranks by cause, and whether it fits.

States lie as the engine keeps them: weights in the compute precision at lp, gradient sums in fp32 at lg, masters and
AdamW's moments at lo. What a step needs beside them, weights that are whole, gradients on their way, activations and the
loss, is that of its fullest moment: `moments.py`.
"""

from dataclasses import dataclass
from math import prod

from thinwire.cost.candidate import Candidate, Setting
from thinwire.cost.moments import fullest
from thinwire.cost.placement import Axes, Hop
from thinwire.cost.schedule import in_flight
from thinwire.cost.stages import Counted, kinds, parameters_of
from thinwire.cost.states import hop_depths

MARGIN = 1.05
"""A plan is said to fit only if this many times the predicted memory would still fit."""
SPREAD = 0.08
"""Half of the interval given around a prediction, as a share of it."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of a stage, by cause."""

    stage: int
    params: float
    grads: float
    optimizer: float
    residual: float
    """What error feedback has not sent of earlier steps' gradients."""
    gathered: float
    """Whole units while they compute, gradients on their way, and what of them error feedback keeps for the next step."""
    activations: float
    """What forward has left for backward at that moment, of all micro-batches under way."""
    live: float
    """What the loss needs beside them; or the gradients inside a block, and the block if it is computed again."""
    outer: float
    """Outer weights and momentum on the device: of the fragment that is due; on a CPU, which is its own host, all."""
    framework: float
    host: float
    """Outer weights, momentum and the residual of error feedback, where they are kept; not in the total."""

    @property
    def total(self) -> float:
        return (
            self.params + self.grads + self.optimizer + self.residual + self.gathered + self.activations + self.live
            + self.outer + self.framework
        )  # fmt: skip

    @property
    def interval(self) -> tuple[float, float]:
        return self.total * (1 - SPREAD), self.total * (1 + SPREAD)

    def fits(self, capacity: float) -> bool:
        """Whether a figure larger by 5% would still fit."""
        return self.total * MARGIN <= capacity


def stage_memory(setting: Setting, candidate: Candidate, axes: Axes, counted: Counted) -> Memory:
    """Memory of the first stage of this kind (of equal stages the one that holds most)."""
    units = parameters_of(setting, counted.kind, candidate.tensor)
    total = units["block"] * counted.kind.blocks + units.get("embedding", 0.0) + units.get("head", 0.0)
    cut_p, cut_g, cut_o = cuts(candidate, axes.states)
    flying = in_flight(counted.index, candidate.pipeline, candidate.accumulate(setting), candidate.chunks)
    cut = (cut_p, cut_g)
    lost = residual_bytes(total, candidate, axes.states)
    held = fullest(setting, candidate, counted.kind, units, flying=flying, cuts=cut, hops=axes.states, lost=lost)
    framework = setting.framework
    host, due = outer_bytes(total, setting, candidate)
    return Memory(
        stage=counted.index,
        params=_weights_bytes(setting, candidate, axes.states, total),
        grads=framework.grad_bytes * total / cut_g,
        optimizer=framework.optimizer_bytes * total / cut_o,
        residual=lost,
        gathered=held.gathered,
        activations=held.activations,
        live=held.live,
        outer=host if setting.cluster.device.kind == "cpu" else due,
        framework=float(setting.calibration.framework_bytes),
        host=host,
    )


def _weights_bytes(setting: Setting, candidate: Candidate, hops: tuple[Hop, ...], total: float) -> float:
    """Weights in the compute precision, but for the fp32 masters that lie in them: no codec came between (`Flat`)."""
    cut_p, _, cut_o = cuts(candidate, hops)
    if setting.framework.casts_on_gather and cut_p == cut_o:
        return 0.0
    lp, _, lo = hop_depths(candidate, hops)
    refreshed = [hop.level for hop in hops[lp + 1 : lo + 1] if hop.fanout > 1]
    coded = candidate.weights and any(candidate.weights[level] not in (None, "fp32") for level in refreshed)
    inside = 4.0 * total / cut_o if setting.compute_dtype == "fp32" and not coded else 0.0
    return setting.compute_bytes * total / cut_p - inside


def residual_bytes(parameters: float, candidate: Candidate, hops: tuple[Hop, ...]) -> float:
    """fp32, of the sums that enter the outermost hop whose codec loses something (`comm/residual.py`)."""
    lg, carries = hop_depths(candidate, hops)[1], candidate.coding.error_feedback and candidate.grads
    coded = [i for i, hop in enumerate(hops) if carries and i > lg and hop.fanout > 1 and candidate.grads[hop.level]]
    if not coded:
        return 0.0
    return 4.0 * parameters / prod(hop.fanout for hop in hops[: coded[-1]])


def outer_bytes(parameters: float, setting: Setting, candidate: Candidate) -> tuple[float, float]:
    """(in host memory, of the fragment that is due) of a rank whose stage and tensor part has so many parameters.

    fp32 weights and momentum, and the residual with error feedback, cut over all ranks of the group that hold the same
    parameters, whatever the partition.
    """
    sync = candidate.sync
    if sync is None:
        return 0.0, 0.0
    own = parameters / max(1, candidate.data(setting.cluster) * candidate.context)
    return (12.0 if sync.error_feedback else 8.0) * own, 8.0 * own / sync.fragments


def peak_memory(setting: Setting, candidate: Candidate, axes: Axes) -> Memory:
    """Memory of the fullest stage."""
    stages = kinds(setting.spec.layers, candidate.pipeline)
    return max((stage_memory(setting, candidate, axes, each) for each in stages), key=lambda memory: memory.total)


def least_state_bytes(setting: Setting, candidate: Candidate, axes: Axes) -> float:
    """A lower bound of memory that needs neither activations nor logits: states alone."""
    total = setting.parameters / (candidate.tensor * candidate.pipeline)
    _, cut_g, cut_o = cuts(candidate, axes.states)
    framework = setting.framework
    weights = _weights_bytes(setting, candidate, axes.states, total)
    return weights + total * (framework.grad_bytes / cut_g + framework.optimizer_bytes / cut_o)


def cuts(candidate: Candidate, hops: tuple[Hop, ...]) -> tuple[int, int, int]:
    """Into how many parts parameters, gradients and optimizer states are cut."""
    cumulative = [1]
    for hop in hops:
        cumulative.append(cumulative[-1] * hop.fanout)
    lp, lg, lo = hop_depths(candidate, hops)
    return cumulative[lp + 1], cumulative[lg + 1], cumulative[lo + 1]
