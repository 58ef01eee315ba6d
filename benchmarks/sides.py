"""The sides of a comparison: thinwire's partitions and PyTorch's own trainers, each built the same way.

A side is made from the same weights, takes the same batches and uses AdamW with the same settings; gradients are means
over all ranks. `THINWIRE` and `TORCH` map a side's name to what builds it; other kinds of side join as further dicts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from thinwire import Cluster, OuterSync, ShardedOptimizer, World, shard
from thinwire.cluster.cluster import Level
from thinwire.comm.driver import Driver
from thinwire.model.presets import preset
from thinwire.model.transformer import Transformer
from thinwire.parallel.shard import engine, reductions, weights
from thinwire.plan.plan import PlanConfig

CLUSTER = Cluster(levels=(Level(name="node", fanout=2), Level(name="cluster", fanout=2)))
WIRES: dict[str, dict[str, Any]] = {
    "ddp": {"partition": "ddp"},
    "hsdp": {"partition": "hsdp"},
    "auto": {"partition": "auto"},
    "auto+int8": {"partition": "auto", "compression": {"weights": {"cluster": "int8"}, "grads": {"cluster": "int8"}}},
    "auto+int4": {
        "partition": "auto",
        "compression": {"weights": {"cluster": "delta-int4"}, "grads": {"cluster": "int4"}},
    },
    "auto+int4 kept": {
        "partition": "auto",
        "keep_gathered": True,
        "compression": {"weights": {"cluster": "delta-int4"}, "grads": {"cluster": "int4"}},
    },
    "auto+lowrank4": {
        "partition": "auto",
        "compression": {"weights": {"cluster": "delta-int4"}, "grads": {"cluster": "lowrank"}, "rank": 4},
    },
    "hsdp+lowrank4": {"partition": "hsdp", "compression": {"grads": {"cluster": "lowrank"}, "rank": 4}},
    "hsdp+lowrank5": {"partition": "hsdp", "compression": {"grads": {"cluster": "lowrank"}, "rank": 5}},
}
"""Plans on the levels node, cluster. `hsdp+lowrank` is what PowerSGD sends: no weights cross the slow link. With rank 5 it
still sends less than the hook does with rank 4."""
ROUNDS: dict[str, dict[str, Any]] = {
    "diloco": {"kind": "diloco"},
    "streaming e3m0": {"kind": "streaming_diloco", "fragments": 4, "delay": 3},
    "summed e3m0": {
        "kind": "streaming_diloco",
        "fragments": 4,
        "delay": 8,
        "staleness_bound": 2,
        "level": "node",
        "sum_inside": "node",
    },
    "eager": {"kind": "eager"},
    "co2": {"kind": "co2"},
}
"""Hosts as worker groups that agree once a round, optimizer states cut inside each; or ranks as groups, those of a host
adding up what they changed before it travels, none more than two steps ahead of another. Fragments are sent every
`inner_steps` / 4 steps; a delay that is no multiple of that applies them in other steps than those that send."""
EXACT = ("thinwire ddp", "thinwire hsdp", "thinwire auto")


@dataclass(frozen=True)
class Setting:
    """What every side is given. `environment` has torchrun's variables."""

    model: str
    lr: float
    rank: int
    ranks: int
    environment: Mapping[str, str]
    accumulate: int = 1
    """Micro-batches of a step."""
    inner_steps: int = 20
    """Steps between two rounds, for sides that agree now and then."""


@dataclass
class Side:
    """One trainer. `step` takes this rank's micro-batches and makes one optimizer step; `finish` lands what is in flight."""

    step: Callable[[Sequence[Tensor]], None]
    loss: Callable[[Tensor], Tensor]
    """The model's mean loss on (sequences, tokens + 1) ids, called by all ranks together, without gradients."""
    finish: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None
    period: int = 1
    """Steps after which the pattern of traffic repeats: figures are taken over multiples of it."""


Builder = Callable[[Setting], Side]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


def fresh(name: str) -> Transformer:
    return Transformer(preset(name))


def thinwire_side(setting: Setting, options: Mapping[str, Any], world: World | None = None) -> Side:
    """thinwire under a plan; joins the world itself unless given one."""
    plan = PlanConfig.model_validate(options).resolve(CLUSTER, micro_batch=1, accumulate=1)
    world = world or World.from_environment(CLUSTER, setting.environment)
    group = world if plan.sync is None else world.inside(plan.levels_in_group)
    sharded = shard(fresh(setting.model), plan.of_group(), group)
    optimizer = ShardedOptimizer(sharded, lambda groups: torch.optim.AdamW(groups, lr=setting.lr, fused=True))
    sync = None if plan.sync is None else OuterSync(sharded, plan.sync, world)

    def step(batches: Sequence[Tensor]) -> None:
        for number, tokens in enumerate(batches):
            with sharded.micro_batch(last=number == len(batches) - 1):
                share = loss_of(sharded.module, tokens) / (group.size * len(batches))  # sums are means, as peers' are
                share.backward()  # type: ignore[no-untyped-call]
        sharded.finish_reduce()
        optimizer.step()
        if sync is not None:
            sync.after(optimizer.updates)

    def loss(tokens: Tensor) -> Tensor:
        with sync.outer_weights() if sync is not None else nullcontext():
            return loss_of(sharded.module, tokens)

    def close() -> None:
        if sync is not None:
            sync.settle()
            sharded.drain()
        world.leave()

    return Side(step, loss, sharded.drain, close, period=1 if plan.sync is None else plan.sync.inner_steps)


def rounds_side(setting: Setting, sync: Mapping[str, Any]) -> Side:
    """thinwire with a round every `inner_steps`."""
    partition = "ddp" if "level" in sync else "zero1"  # a group of one rank has nothing to cut
    return thinwire_side(setting, {"partition": partition, "sync": {**sync, "inner_steps": setting.inner_steps}})


def join_torch(setting: Setting) -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=setting.rank, world_size=setting.ranks)


def leave_torch() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def ddp(setting: Setting, hook: str | None = None, bucket_mb: int = 4) -> Side:
    """DistributedDataParallel with small buckets, which overlap with the backward, and one of its communication hooks."""
    join_torch(setting)
    model = nn.parallel.DistributedDataParallel(fresh(setting.model), bucket_cap_mb=bucket_mb)
    if hook == "powersgd":
        # From the second step on; its collectives are issued from callbacks, so more than one bucket would interleave.
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif hook is not None:
        model.register_comm_hook(None, getattr(default_hooks, hook))
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, fused=True)

    def step(batches: Sequence[Tensor]) -> None:
        for number, tokens in enumerate(batches):
            model.require_backward_grad_sync = number == len(batches) - 1
            (loss_of(model, tokens) / len(batches)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    def close() -> None:
        # A Reducer that is the last to hold its group waits for the group's threads with the GIL, which they may want.
        del model.logger, model.reducer
        leave_torch()

    return Side(step, partial(loss_of, model), close=close)


def fsdp(setting: Setting, hybrid: bool) -> Side:
    """FSDP2; `hybrid`: sharded inside the host, replicated across, its all-reduce deferred to the last micro-batch."""
    join_torch(setting)
    shape, names = ((2, 2), ("replicate", "shard")) if hybrid else ((setting.ranks,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model: Any = fresh(setting.model)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr)

    def step(batches: Sequence[Tensor]) -> None:
        for number, tokens in enumerate(batches):
            if hybrid:
                model.set_requires_all_reduce(number == len(batches) - 1)
            (loss_of(model, tokens) / len(batches)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return Side(step, partial(loss_of, model), close=leave_torch)


def alone(setting: Setting) -> Side:
    """Every rank trains on its own: the speed that no network could raise."""
    join_torch(setting)
    model = fresh(setting.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, fused=True)

    def step(batches: Sequence[Tensor]) -> None:
        for tokens in batches:
            (loss_of(model, tokens) / len(batches)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return Side(step, partial(loss_of, model), close=leave_torch)


class Blocking(Driver):
    """Collectives that are waited for as soon as they are issued."""

    def __init__(self, *hops: Iterator[Any]) -> None:
        super().__init__(*hops)
        self.finish()


def waiting_side(setting: Setting, options: Mapping[str, Any]) -> Side:
    """thinwire with nothing behind anything, for the rest of this process."""
    for module in (engine, reductions, weights):
        module.Driver = Blocking
    return thinwire_side(setting, options)


NO_NETWORK = "no network"
THINWIRE: dict[str, Builder] = {
    f"thinwire {name}": partial(thinwire_side, options=options) for name, options in WIRES.items()
} | {f"thinwire {name}": partial(rounds_side, sync=sync) for name, sync in ROUNDS.items()}
WAITING: dict[str, Builder] = {
    f"thinwire {name}, waiting": partial(waiting_side, options=WIRES[name]) for name in ("ddp", "hsdp", "auto")
}
"""Twins that overlap nothing, each in a process of its own."""
TORCH: dict[str, Builder] = {
    "torch DDP": ddp,
    "DDP + fp16 hook": partial(ddp, hook="fp16_compress_hook"),
    "DDP + bf16 hook": partial(ddp, hook="bf16_compress_hook"),
    "DDP + PowerSGD 4": partial(ddp, hook="powersgd", bucket_mb=1000),
    "FSDP2": partial(fsdp, hybrid=False),
    "FSDP2-HSDP": partial(fsdp, hybrid=True),
}
