"""The planner's whole answer: the best plans, and outer synchronisation where every step is too often.

Groups that synchronise rarely train differently, so speed alone never chooses them: they are offered beside the best plan
that synchronises every step, when that one computes for less than half of its time (or when the user asks). `plan_for` and
`simulate_plan` ask from one's own Python, without files. No torch.
"""

import warnings
from dataclasses import replace
from typing import Literal

from thinwire.cluster import hardware as clusters
from thinwire.cluster.cluster import Cluster
from thinwire.errors import PlanError, UseError
from thinwire.model import presets as models
from thinwire.model.spec import ModelSpec
from thinwire.plan.plan import ComputeDtype, Plan
from thinwire.plan.sync import least_delay
from thinwire.planner.search import Choice, SearchResult, busy, fits, in_order, search
from thinwire.planner.space import Codecs, Space, show_axes, show_states
from thinwire.predict.bound import least_inner_s
from thinwire.predict.candidate import Candidate, CandidateSync, Setting
from thinwire.predict.outer_cost import outer_round
from thinwire.predict.perturbation import Perturbation
from thinwire.predict.placement import check_device, place
from thinwire.predict.simulate import Simulated, simulate_step

Outer = Literal["auto", "never", "always"]
BUSY_ENOUGH = 0.5
"""Share of compute under which synchronising every step is called too often."""
STALL_ALLOWED = 0.05
INTERVALS = (16, 32, 64, 128, 256, 512)


def choose(setting: Setting, space: Space, *, keep: int = 20, outer: Outer = "auto") -> Choice:
    """The best plans. Raises PlanError with the smallest change if nothing fits, ConfigError if figures are missing."""
    found = search(setting, space, keep=keep)
    if not found.best:
        raise PlanError(fits_nowhere(setting, space, found))
    possible = space.sync is None and setting.cluster.levels[-1].fanout > 1 and len(setting.cluster.levels) > 1
    wanted = outer == "always" or (outer == "auto" and busy(found.best[0]) < BUSY_ENOUGH)
    rare = rarely(setting, space, keep) if possible and wanted else None
    return Choice(found, rare)


def rarely(setting: Setting, space: Space, keep: int) -> SearchResult | None:
    """Plans whose groups, the members of the outermost level, synchronise as often as costs at most a twentieth of the time.

    The steps inside a group do not depend on how often groups synchronise: the least bound of all says how long they are.
    """
    try:
        found = SearchResult()
        first = next(in_order(setting, replace(space, sync=_sync(setting, INTERVALS[-1])), found), None)
        if first is None:
            return found
        inner_s = least_inner_s(setting, first.candidate, first.axes, first.core)
        return search(setting, replace(space, sync=_least_often(setting, inner_s)), keep=keep)
    except PlanError:
        return None


def _sync(setting: Setting, inner_steps: int) -> CandidateSync:
    fragments = max(1, min(setting.spec.layers // 3, inner_steps // 2))
    delay = least_delay(setting.cluster.levels[-1].fanout)
    return CandidateSync(len(setting.cluster.levels) - 1, inner_steps, fragments, overlap_steps=delay, codec="e3m0")


def _least_often(setting: Setting, inner_s: float) -> CandidateSync:
    """The shortest interval whose stalls are small beside the steps."""
    every = [_sync(setting, inner_steps) for inner_steps in INTERVALS]
    fine = [sync for sync in every if outer_round(setting, sync, inner_s).stall_per_step_s <= STALL_ALLOWED * inner_s]
    return fine[0] if fine else every[-1]


def plan_for(
    model: ModelSpec | str,
    cluster: Cluster | str,
    *,
    sequences: int,
    tokens: int,
    codecs: Codecs = "none",
    compute_dtype: ComputeDtype | None = None,
    outer: Outer = "never",
) -> Plan:
    """The fastest plan that fits and that thinwire runs, for `shard`, `simulate_plan` or `thinwire train --plan`.

    `model` and `cluster` are what a preset's name stands for, or your own; a step has `sequences` of so many `tokens` over
    all ranks. `codecs` says what states may travel as outside the innermost level: as they are, in bf16, or any. With
    `outer`, members of the outermost level may synchronise once in a while, which trains differently: always, or (auto)
    where the best plan that synchronises every step computes for less than half of its time. The default precision is bf16,
    on CPUs fp32. Raises ConfigError for an unknown name or a missing figure of the cluster, PlanError with the smallest
    change that would help if nothing fits.
    """
    setting = _setting(model, cluster, sequences, tokens, compute_dtype)
    best = choose(setting, Space(runnable=True, codecs=codecs), keep=20, outer=outer).best
    return best.candidate.to_plan(setting)


def simulate_plan(
    model: ModelSpec | str,
    cluster: Cluster | str,
    plan: Plan,
    *,
    tokens: int,
    perturbation: Perturbation | None = None,
    trouble: Perturbation | None = None,
) -> Simulated:
    """Simulate one step of `plan`: its seconds, a step's share of the rounds' stalls among them; what each stream did when.

    The batch is the plan's own. Raises PlanError if the plan is for other levels, ConfigError as `plan_for` does.
    """
    known = clusters.preset(cluster) if isinstance(cluster, str) else cluster
    plan.check_levels(known)
    sequences = plan.micro_batch * plan.accumulate * known.ranks
    setting = _setting(model, known, sequences, tokens, plan.compute_dtype)
    candidate = Candidate.of_plan(plan, setting.spec.layers)
    axes = place(candidate, known, setting.calibration)
    if trouble is not None:
        if perturbation is not None:
            raise UseError("trouble is perturbation now, and both are given; leave trouble out")
        warnings.warn(
            "trouble is perturbation now; the old name works for one more release", FutureWarning, stacklevel=2
        )
    return simulate_step(setting, candidate, axes, perturbation or trouble)


def _setting(
    model: ModelSpec | str, cluster: Cluster | str, sequences: int, tokens: int, dtype: ComputeDtype | None
) -> Setting:
    spec = models.preset(model) if isinstance(model, str) else model
    known = clusters.preset(cluster) if isinstance(cluster, str) else cluster
    check_device(known.device)
    precision: ComputeDtype = dtype or ("fp32" if known.device.kind == "cpu" else "bf16")
    calibration = clusters.calibration_of(known)
    return Setting(spec, known, sequences, tokens, calibration=calibration, compute_dtype=precision)


def fits_nowhere(setting: Setting, space: Space, found: SearchResult) -> str:
    """What to change when no plan fits: a larger device, more of the outermost level, or shorter sequences."""
    capacity = setting.cluster.device.memory_bytes
    assert capacity and found.closest is not None
    candidate, _, memory = found.closest
    need = memory.total * 1.05
    largest = max(
        ("params", "grads", "optimizer", "residual", "gathered", "activations", "live", "framework"),
        key=lambda name: getattr(memory, name),
    )
    text = (
        f"no plan fits: the smallest needs {need / 2**30:.1f} of {capacity / 2**30:.1f} GiB at stage {memory.stage} "
        f"({show_axes(candidate, setting)} {show_states(candidate, setting)}), most of it {largest}"
    )
    for factor in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        larger = _with_more(setting, factor)
        try:
            if fits(larger, space):
                return f"{text}; {_more_of(setting, larger)} ({larger.cluster.ranks} ranks) would fit"
        except PlanError:
            continue
    return f"{text}; a device with {need / 2**30:.0f} GiB would fit"


def _more_of(setting: Setting, larger: Setting) -> str:
    last = larger.cluster.levels[-1]
    if len(setting.cluster.levels) > 1:
        return f"{last.name} = {last.fanout}"
    node = setting.cluster.levels[0]
    return f"{last.fanout} {node.name}s of {node.fanout}, cluster.levels = [{node.fanout}, {last.fanout}]"


def _with_more(setting: Setting, factor: int) -> Setting:
    """The setting with `factor` times as many of the outermost level, and a batch that divides over it.

    A cluster of one level is one machine: it gets no larger, there are more of it, joined by links like those inside.
    """
    *inner, last = setting.cluster.levels
    if inner:
        levels = (*inner, last.model_copy(update={"fanout": last.fanout * factor}))
    else:
        levels = (last, last.model_copy(update={"name": f"{last.name}s", "fanout": factor}))
    cluster = setting.cluster.model_copy(update={"levels": levels})
    sequences = -(-setting.sequences // cluster.ranks) * cluster.ranks
    return replace(setting, cluster=cluster, sequences=sequences)
