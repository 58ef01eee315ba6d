"""Planning from Python: the same plans as the command's, steps that can be simulated, and sentences for wrong input."""

import json
from pathlib import Path

import pytest

from runs import thinwire
from thinwire import Cluster, Plan, plan_for, simulate_plan
from thinwire.cluster.hardware import preset as cluster_preset
from thinwire.errors import ConfigError, PlanError, ThinwireError
from thinwire.model.presets import preset
from thinwire.predict.perturbation import Perturbation

MODEL, CLUSTER, SEQUENCES, TOKENS = "llama-2-7b", "dgx-a100-4", 64, 2048


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_for(MODEL, CLUSTER, sequences=SEQUENCES, tokens=TOKENS)


def test_it_is_the_commands_plan(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        f'[model]\npreset = "{MODEL}"\n[batch]\nsequences = {SEQUENCES}\ntokens = {TOKENS}\n'
        f'[cluster]\npreset = "{CLUSTER}"\n'
    )
    done = thinwire("plan", tmp_path / "run.toml", "--runnable", "--codecs", "none", "-o", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    assert plan == Plan.model_validate(json.loads((tmp_path / "plan.json").read_text()))


def test_names_and_what_they_stand_for_are_the_same(plan: Plan) -> None:
    own = plan_for(preset(MODEL), cluster_preset(CLUSTER), sequences=SEQUENCES, tokens=TOKENS)
    assert own == plan
    assert plan.micro_batch * plan.accumulate * cluster_preset(CLUSTER).ranks == SEQUENCES


def test_a_plan_is_simulated_and_perturbations_make_it_slower(plan: Plan) -> None:
    simulated = simulate_plan(MODEL, CLUSTER, plan, tokens=TOKENS)
    assert max(span.end_s for span in simulated.spans) == pytest.approx(simulated.step_s)
    slow = simulate_plan(MODEL, CLUSTER, plan, tokens=TOKENS, perturbation=Perturbation(slow_ranks={(0, 0): 1.5}))
    with pytest.warns(FutureWarning, match="^trouble is perturbation now"):
        old = simulate_plan(MODEL, CLUSTER, plan, tokens=TOKENS, trouble=Perturbation(slow_ranks={(0, 0): 1.5}))
    assert old == slow
    assert 1.2 * simulated.step_s < slow.step_s < 1.6 * simulated.step_s


@pytest.mark.parametrize(
    ("model", "cluster", "error", "words"),
    [
        ("llama-2-7", CLUSTER, ConfigError, "did you mean 'llama-2-7b'"),
        (MODEL, "dgx", ConfigError, "cluster preset 'dgx'"),
        ("llama-3.1-405b", CLUSTER, PlanError, "fits"),
        (MODEL, Cluster(levels=cluster_preset(CLUSTER).levels), ConfigError, "has no peak_flops_per_s"),
    ],
)
def test_wrong_input_is_a_sentence(model: str, cluster: str | Cluster, error: type[ThinwireError], words: str) -> None:
    with pytest.raises(error, match=words):
        plan_for(model, cluster, sequences=SEQUENCES, tokens=TOKENS)


def test_a_plan_for_other_levels_is_refused(plan: Plan) -> None:
    with pytest.raises(PlanError, match="the plan is for the levels"):
        simulate_plan(MODEL, "h100-400g-2048", plan, tokens=TOKENS)
