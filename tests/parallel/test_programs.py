"""Ranks that would train by different programs hear of it before the first message of a step, on every rank."""

from typing import Any

import pytest
import torch
from torch import nn

from partition_toy import plan_of
from thinwire.comm.world import World
from thinwire.errors import UseError
from thinwire.parallel.shard.engine import shard
from worlds import run_world

DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a layer more": ({"layers": 2}, {"layers": 3}, "2 to 3 units"),
    "wider": ({"width": 4}, {"width": 6}, "numbers in them"),
    "transposed sizes": ({"sizes": [4, 8]}, {"sizes": [8, 4]}, "of other shapes"),
    "frozen": ({}, {"frozen": True}, "of other shapes"),
    "precision": ({}, {"dtype": torch.float64}, "of other shapes"),
    "cut": ({"cut": (-1, -1, 0)}, {"cut": (0, 0, 0)}, "at other levels"),
    "accumulation": ({"accumulate": 1}, {"accumulate": 2}, "of other shapes"),
    "kept": ({"cut": (0, 0, 0)}, {"cut": (0, 0, 0), "keep_gathered": True}, "of other shapes"),
    "codec": (
        {"compression": {"grads": {"node": "int8"}}},
        {"compression": {"grads": {"node": "int4"}}},
        "of other shapes",
    ),
}


def _model(
    layers: int = 2, width: int = 4, sizes: Any = None, frozen: bool = False, dtype: Any = torch.float32
) -> nn.Module:
    widths = sizes or [width] * layers
    model = nn.Sequential(*(nn.Linear(4, 2 * out, bias=False, dtype=dtype) for out in widths))
    model[0].weight.requires_grad_(not frozen)
    return model


def _different(world: World, name: str) -> str:
    mine = dict(DIFFERENT[name][world.rank % 2])
    model = _model(**{key: mine.pop(key) for key in ("layers", "width", "sizes", "frozen", "dtype") if key in mine})
    cut, accumulate = mine.pop("cut", (-1, -1, 0)), mine.pop("accumulate", 1)
    try:
        shard(model, plan_of(world, cut, accumulate, **mine), world)
    except UseError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", DIFFERENT)
def test_ranks_with_different_programs_get_a_sentence(name: str) -> None:
    told = run_world((2,), _different, name)
    assert all("different models, or under different plans" in sentence for sentence in told), told
    assert all(DIFFERENT[name][2] in sentence for sentence in told), told
