"""Plans: names are points of one space, what is illegal is answered with the rule and the nearest legal choice."""

import itertools

import pytest

from thinwire.cluster.cluster import Cluster, Level
from thinwire.config import build
from thinwire.errors import ConfigError, PlanError
from thinwire.plan import Partition, Plan, PlanConfig, resolve_partition

LEVELS = ("pair", "node", "cluster")
CLUSTER = Cluster(levels=tuple(Level(name=name, fanout=2) for name in LEVELS))


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("ddp", "(replica; replica; replica)"),
        ("zero1", "(replica; replica; cluster)"),
        ("zero2", "(replica; cluster; cluster)"),
        ("zero3", "(cluster; cluster; cluster)"),
        ("hsdp", "(node; node; node)"),
        ("mics", "(node; node; node)"),
        ("zero++", "(node; cluster; cluster)"),
        ("frontier", "(pair; node; cluster)"),
        ("auto", "(node; node; cluster)"),
        ("amsp(pair; pair; all)", "(pair; pair; cluster)"),
        ("amsp(replica;node;node)", "(replica; node; node)"),
    ],
)
def test_names_resolve_to_points_and_print_themselves(name: str, point: str) -> None:
    assert str(resolve_partition(name, LEVELS)[0]) == point


def test_auto_on_one_level_does_not_cut_what_is_gathered_each_micro_batch() -> None:
    assert str(resolve_partition("auto", ("ethernet",))[0]) == "(replica; replica; ethernet)"
    assert str(resolve_partition("auto", ("fast", "slow"))[0]) == "(fast; fast; slow)"


def test_zero_plus_plus_brings_its_codecs() -> None:
    wire = resolve_partition("zero++", LEVELS)[1]
    assert dict(wire.weights) == {"cluster": "int8"}
    assert dict(wire.grads) == {"cluster": "int4"}


def test_exactly_the_ordered_cuts_are_legal() -> None:
    names = ("replica", *LEVELS)
    for params, grads, optimizer in itertools.product(names, repeat=3):
        partition = Partition(params=params, grads=grads, optimizer=optimizer)
        depths = tuple(names.index(name) - 1 for name in (params, grads, optimizer))
        if depths[0] <= depths[1] <= depths[2]:
            assert partition.depths(LEVELS) == depths
        else:
            with pytest.raises(PlanError, match="the nearest legal one is"):
                partition.depths(LEVELS)


def test_frozen_weights_may_be_cut_further_than_gradients() -> None:
    partition = Partition(params="node", grads="replica", optimizer="cluster", frozen_weights=True)
    assert partition.depths(LEVELS) == (1, -1, 2)


def test_the_nearest_legal_choice_is_named() -> None:
    with pytest.raises(PlanError, match=r"the nearest legal one is \(node; node; cluster\)"):
        Partition(params="node", grads="pair", optimizer="cluster").depths(LEVELS)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"partition": "zero4"}, "partition 'zero4' is unknown"),
        ({"partition": {"params": "rack"}}, "is no level"),
        ({"partition": {"parms": "node"}}, "did you mean 'params'"),
        ({"partition": "amsp(all;replica;replica)"}, "is illegal"),
        ({"recompute": "some"}, "recompute"),
        ({"wire": {"block": 100}}, "block"),
    ],
)
def test_wrong_plans_get_a_sentence(tree: dict[str, object], says: str) -> None:
    with pytest.raises((ConfigError, PlanError), match=says):
        build(PlanConfig, tree, "run.toml").resolve(CLUSTER, micro_batch=1, accumulate=1)


def test_equal_plans_have_equal_digests_and_survive_json() -> None:
    plan = PlanConfig(partition="frontier").resolve(CLUSTER, micro_batch=2, accumulate=3)
    again = Plan.model_validate_json(plan.model_dump_json())
    assert again == plan
    assert again.digest == plan.digest
    assert plan.digest != plan.model_copy(update={"micro_batch": 4}).digest
