"""DiLoCo of torchft 0.2, the open PyTorch implementation, where both can say the same: the same trajectory."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sync_toy import Group, Stack, draw
from thinwire.comm.world import World
from worlds import run_world

ROUNDS, EVERY, LR, MOMENTUM = 3, 4, 0.7, 0.9
WAIT = timedelta(seconds=60)


def _torchft(world: World) -> list[torch.Tensor]:
    """The weights after every round. One rank is one replica group; the model is one fragment, fp32, no delay."""
    from torchft import Manager, ProcessGroupGloo
    from torchft.coordination import LighthouseServer
    from torchft.local_sgd import DiLoCo

    lighthouse, address = None, [""]
    if world.rank == 0:
        lighthouse = LighthouseServer("127.0.0.1:0", min_replicas=world.size, join_timeout_ms=60_000)
        address[0] = f"http://127.0.0.1:{lighthouse.address().rsplit(':', 1)[1]}"
    dist.broadcast_object_list(address, src=0)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    state: dict[str, Any] = {}
    manager = Manager(
        pg=ProcessGroupGloo(timeout=WAIT), load_state_dict=state.update, state_dict=lambda: dict(state),
        min_replica_size=world.size, use_async_quorum=False, timeout=WAIT, quorum_timeout=WAIT, rank=0, world_size=1,
        store_addr="127.0.0.1", store_port=store.port, lighthouse_addr=address[0], hostname="127.0.0.1",
        replica_id=f"replica{world.rank}", init_sync=False,
    )  # fmt: skip
    module = Stack()
    inner = torch.optim.AdamW(module.parameters(), lr=1e-2)
    outer = torch.optim.SGD(module.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True)
    seen = []
    with DiLoCo(manager, [module], inner, outer, sync_every=EVERY, pin_memory=False):
        for step in range(ROUNDS * EVERY):
            inner.zero_grad()
            module(draw(step, world.rank)).square().mean().backward()
            inner.step()
            if (step + 1) % EVERY == 0:
                seen.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    dist.barrier()
    manager.shutdown(wait=False)
    if lighthouse is not None:
        lighthouse.shutdown()
    return seen


def _both(world: World) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    theirs = _torchft(world)
    group, ours = Group(world, {"inner_steps": EVERY, "outer_lr": LR, "outer_momentum": MOMENTUM}), []
    for _ in range(ROUNDS):
        group.train(EVERY)
        ours.append(group.local())
    return theirs, ours


def test_three_rounds_of_diloco_are_torchfts() -> None:
    pytest.importorskip("torchft")
    before = torch.cat([p.detach().flatten() for p in Stack().parameters()])
    for theirs, ours in run_world([("site", 2)], _both, timeout_s=180):
        for number, (their_weights, our_weights) in enumerate(zip(theirs, ours, strict=True)):
            assert torch.allclose(our_weights, their_weights, rtol=1e-5, atol=1e-5), f"round {number}"
            assert (our_weights - before).abs().max() > 1e-2
            before = our_weights
        before = torch.cat([p.detach().flatten() for p in Stack().parameters()])
