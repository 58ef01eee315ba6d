"""Aggregates added up as they are decoded, and steps taken chunk by chunk, against their references: the same bits."""

import pytest
import torch

from sync_toy import Group
from thinwire.comm.codecs.codec import Codec, Raw, make_codec
from thinwire.comm.codecs.topk import TopK
from thinwire.comm.world import World
from thinwire.plan.sync import Aggregate
from thinwire.sync import outer_step as applying
from thinwire.sync.message import aggregate, aggregate_coded
from worlds import run_world

WEIGHTS = [[1.0] * 4, [1.0, 0.0, 1.0, 1.0], [2.0, 0.0, 0.0, 3.0], [3.0, 3.0, 0.0, 3.0], [0.0] * 4]
HEADS = torch.zeros(16, dtype=torch.uint8)
"""What a message has before its numbers: these are rows of a wider matrix."""
CODERS = {"fp32": Raw(torch.float32), "topk": TopK(), **{name: make_codec(name) for name in ("e3m0", "int8", "bf16")}}


@pytest.mark.parametrize("how", ["mean", "tokens", "median", "trimmed"])
@pytest.mark.parametrize("name", CODERS)
def test_coded_contributions_aggregate_as_decoded_ones(name: str, how: Aggregate) -> None:
    n, coder = 1000, CODERS[name]
    parts = torch.randn(4, n, generator=torch.Generator().manual_seed(1))
    messages = torch.stack([torch.cat([HEADS, coder.encode(part)]) for part in parts])
    coded = messages[:, len(HEADS) :]
    for weights in WEIGHTS:
        expected = aggregate([coder.decode(row, n, torch.float32) for row in coded], weights, how)
        made = torch.full((n,), torch.nan)
        aggregate_coded(coded, made, weights, how, coder)
        assert torch.equal(made.view(torch.int32), expected.view(torch.int32)), weights


def test_what_is_left_out_does_not_count_whatever_it_is() -> None:
    coder: Codec = make_codec("e3m0")
    coded = torch.stack([coder.encode(torch.full((256,), value)) for value in (1.0, torch.nan)])
    made = torch.empty(256)
    aggregate_coded(coded, made, [1.0, 0.0], "mean", coder)
    assert torch.equal(made, torch.ones(256))


def _trained(world: World, at_a_time: int) -> tuple[torch.Tensor, torch.Tensor]:
    applying._CPU_CHUNK = at_a_time
    group = Group(world, {"inner_steps": 4, "fragments": 2, "kind": "streaming_diloco", "mix": 0.5})
    group.train(9)
    return group.local(), group.outer()


def test_chunks_of_any_size_step_and_mix_alike() -> None:
    whole, small = (run_world([("site", 2)], _trained, at_a_time) for at_a_time in (1 << 30, 7))
    for (local, outer), (expected_local, expected_outer) in zip(small, whole, strict=True):
        assert torch.equal(local, expected_local)
        assert torch.equal(outer, expected_outer)
