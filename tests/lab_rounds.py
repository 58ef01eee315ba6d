"""A group of one rank for a test on the lab: `python lab_rounds.py SETTING`, JSON; rank 0 prints JSON.

Trains two blocks of 512 x 512 numbers, whose steps sleep so long that they take the same time on any machine, once for
every delay of a round. For each delay: seconds of every step after a first period, and the stalls of its rounds.
"""

import json
import os
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from sync_toy import Group, sgd
from thinwire.comm.world import World
from worlds import cluster_of

WIDTH = 512


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def periods(world: World, setting: dict[str, Any], delay: int) -> dict[str, Any]:
    """What `setting["periods"]` times H steps took, after one time of H."""
    inner_steps: int = setting["inner_steps"]
    sync = {"kind": "streaming_diloco", "codec": "fp32", "inner_steps": inner_steps, "fragments": 2, "delay": delay}
    group = Group(world, sync, module=Wide(), build=sgd(1e-3))
    rounds, plain = [], group.sync.after

    def after(step: int, *, tokens: float = 1.0) -> list[Any]:
        rounds.extend(applied := plain(step, tokens=tokens))
        return applied

    group.sync.after = after  # type: ignore[method-assign]

    def slow(step: int, rank: int) -> Tensor:
        time.sleep(setting["sleep_s"])
        return torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))

    seconds = []
    for _ in range((1 + setting["periods"]) * inner_steps):
        start_s = time.monotonic()
        group.train(1, batch=slow)
        seconds.append(time.monotonic() - start_s)
    stalls = [one.stall_s for one in rounds if one.apply > inner_steps]
    group.sync.settle()
    return {"seconds": seconds[inner_steps:], "stalls": stalls, "sent_bytes": rounds[-1].sent_bytes}


def main() -> None:
    torch.set_num_threads(1)
    setting = json.loads(sys.argv[1])
    world = World.from_environment(cluster_of([("site", 2)]), os.environ)
    found = {str(delay): periods(world, setting, delay) for delay in setting["delays"]}
    if world.rank == 0:
        print(json.dumps(found))
    world.leave()


if __name__ == "__main__":
    main()
