"""Peers that are packages of their own (`pip install thinwire[peers]`): DeepSpeed's ZeRO, torchft's LocalSGD and DiLoCo.

They are imported when a side is built, so that one that is missing costs its own row only.
"""

import socket
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from sides import Builder, Setting, Side, fresh, join_torch, leave_torch, loss_of
from torch import Tensor

_WAIT = timedelta(seconds=600)


def deepspeed_zero(setting: Setting, stage: int) -> Side:
    """ZeRO of DeepSpeed on CPU, fp32 on the wire: its quantised weights and gradients have no kernels there."""
    import deepspeed

    join_torch(setting)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    model = fresh(setting.model)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": setting.accumulate,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # by default 1; no other side clips
        "zero_optimization": {"stage": stage},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(batches: Sequence[Tensor]) -> None:
        for tokens in batches:
            engine.backward(loss_of(engine, tokens))
            engine.step()

    return Side(step, partial(loss_of, engine), close=leave_torch)


class _Replica:
    """One rank as a replica group of torchft: a store, a process group and a manager of its own, one lighthouse for all."""

    def __init__(self, setting: Setting, *, replicas: int) -> None:
        from torchft import Manager, ProcessGroupGloo
        from torchft.coordination import LighthouseServer

        join_torch(setting)
        host = setting.environment.get("MASTER_ADDR", "localhost")
        self._lighthouse: Any = None
        address: list[str | None] = [None]
        if setting.rank == 0:
            self._lighthouse = LighthouseServer("[::]:0", min_replicas=replicas, join_timeout_ms=60_000)
            address[0] = f"http://{host}:{self._lighthouse.address().rsplit(':', 1)[1]}"
        dist.broadcast_object_list(address, src=0)
        own = f"host{setting.environment['NODE_RANK']}" if "NODE_RANK" in setting.environment else socket.gethostname()
        self._store = dist.TCPStore(own, 0, is_master=True, wait_for_workers=False)
        self._state: dict[str, Any] = {}
        self.manager = Manager(
            pg=ProcessGroupGloo(timeout=_WAIT), load_state_dict=self._state.update, state_dict=lambda: dict(self._state),
            min_replica_size=replicas, use_async_quorum=False, timeout=_WAIT, quorum_timeout=_WAIT, rank=0, world_size=1,
            store_addr=own, store_port=self._store.port, lighthouse_addr=address[0], hostname=own,
            replica_id=f"replica{setting.rank}", init_sync=False,
        )  # fmt: skip

    def close(self) -> None:
        dist.barrier()
        self.manager.shutdown(wait=False)
        if self._lighthouse is not None:
            self._lighthouse.shutdown()
        leave_torch()


def torchft_rounds(setting: Setting, kind: str) -> Side:
    """torchft's LocalSGD or DiLoCo (outer Nesterov SGD, lr 0.7, momentum 0.9), every rank a worker of its own.

    Its streaming DiLoCo has two fragments of three blocks (2501.18512), applied as late as it allows; its 8 bits need CUDA.
    """
    from torchft.local_sgd import DiLoCo, LocalSGD

    replica = _Replica(setting, replicas=setting.ranks)
    model = fresh(setting.model)
    inner = torch.optim.AdamW(model.parameters(), lr=setting.lr, fused=True)
    every = setting.inner_steps
    rounds: Any
    if kind == "LocalSGD":
        rounds = LocalSGD(replica.manager, model, inner, sync_every=every)
    else:
        fragments = [model] if kind == "DiLoCo" else _halves(model)
        outer = [torch.optim.SGD(part.parameters(), lr=0.7, momentum=0.9, nesterov=True) for part in fragments]
        delay = 0 if kind == "DiLoCo" else every // len(fragments) - 1
        rounds = DiLoCo(replica.manager, fragments, inner, outer, sync_every=every, fragment_sync_delay=delay)
    rounds.__enter__()

    def step(batches: Sequence[Tensor]) -> None:
        inner.zero_grad()
        for tokens in batches:
            (loss_of(model, tokens) / len(batches)).backward()  # type: ignore[no-untyped-call]
        inner.step()

    return Side(step, partial(loss_of, model), close=replica.close, period=every)


def _halves(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Every second block, and the others with all that is no block: tied weights stay in one fragment."""
    others = [child for name, child in model.named_children() if name != "blocks"]
    blocks = list(model.get_submodule("blocks").children())
    return [torch.nn.ModuleList([*others, *blocks[0::2]]), torch.nn.ModuleList(blocks[1::2])]


PEERS: dict[str, Builder] = {
    **{f"DeepSpeed ZeRO-{stage}": partial(deepspeed_zero, stage=stage) for stage in (1, 2, 3)},
    **{f"torchft {kind}": partial(torchft_rounds, kind=kind) for kind in ("LocalSGD", "DiLoCo", "streaming")},
}
