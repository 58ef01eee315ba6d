"""Planning from one's own Python: what `thinwire plan` and `thinwire simulate` do, without files. No torch."""

from thinwire.cluster import hardware as clusters
from thinwire.cluster.cluster import Cluster
from thinwire.errors import PlanError
from thinwire.model import presets as models
from thinwire.model.spec import ModelSpec
from thinwire.plan.plan import ComputeDtype, Plan
from thinwire.planner.choose import Outer, choose
from thinwire.planner.space import Codecs, Space
from thinwire.predict.candidate import Candidate, Setting
from thinwire.predict.perturbation import Trouble
from thinwire.predict.placement import check_device, place
from thinwire.predict.simulate import Simulated, simulate_step


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
    `outer`, members of the outermost level may agree once in a while, which trains differently: always, or (auto) where
    the best plan that agrees every step computes for less than half of its time. The default precision is bf16, on CPUs
    fp32. Raises ConfigError for an unknown name or a missing figure of the cluster, PlanError with the smallest change that
    would help if nothing fits.
    """
    setting = _setting(model, cluster, sequences, tokens, compute_dtype)
    best = choose(setting, Space(runnable=True, codecs=codecs), keep=20, outer=outer).best
    return best.candidate.to_plan(setting)


def simulate_plan(
    model: ModelSpec | str, cluster: Cluster | str, plan: Plan, *, tokens: int, trouble: Trouble | None = None
) -> Simulated:
    """Play one step of `plan`: its seconds, a step's share of the stalls of rounds among them; what each lane did when.

    The batch is the plan's own. Raises PlanError if the plan is for other levels, ConfigError as `plan_for` does.
    """
    known = clusters.preset(cluster) if isinstance(cluster, str) else cluster
    levels = tuple((level.name, level.fanout) for level in known.levels)
    if plan.levels != levels:
        raise PlanError(f"the plan is for levels {plan.levels}, the cluster has {levels}; make the plan anew")
    sequences = plan.micro_batch * plan.accumulate * known.ranks
    setting = _setting(model, known, sequences, tokens, plan.compute_dtype)
    candidate = Candidate.of_plan(plan, setting.spec.layers)
    axes = place(candidate, known, setting.calibration)
    return simulate_step(setting, candidate, axes, trouble)


def _setting(
    model: ModelSpec | str, cluster: Cluster | str, sequences: int, tokens: int, dtype: ComputeDtype | None
) -> Setting:
    spec = models.preset(model) if isinstance(model, str) else model
    known = clusters.preset(cluster) if isinstance(cluster, str) else cluster
    check_device(known.device)
    precision: ComputeDtype = dtype or ("fp32" if known.device.kind == "cpu" else "bf16")
    calibration = clusters.calibration_of(known)
    return Setting(spec, known, sequences, tokens, calibration=calibration, compute_dtype=precision)
