"""A case trained: in one process, which is the reference, under a plan of thinwire, and by torch's own trainers.

The reference is one replica of the module for each rank, trained in one process: gradients are averaged over replicas in
rank order, and each replica takes the same step. So everything that a rank keeps to itself (batch statistics, weights
that a forward writes) is compared with what that rank alone would have.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parameter import is_lazy

from thinwire import ShardedOptimizer, World, shard
from thinwire.plan.plan import PlanConfig
from zoo.cases import Case, whole
from zoo.compare import Reference, Seen

STEPS, MOMENTUM = 3, 0.9
PEERS = ("torch DDP", "FSDP2")
Around = Callable[[bool], AbstractContextManager[Any]]
"""What a micro-batch happens in, given whether it is the last of its step."""


def reference(case: Case, ranks: int) -> Reference:
    """The case trained in this process alone. Raises whatever the module raises."""
    replicas = [seeded(case) for _ in range(ranks)]
    first = replicas[0]
    before = parameters_of(first)
    optimizers = [optimizer_of(case, [p for p in replica.parameters() if p.requires_grad]) for replica in replicas]
    seen = [Seen() for _ in replicas]
    for step in range(STEPS):
        for rank, replica in enumerate(replicas):
            losses_of(case, replica, step, rank, seen[rank], lambda last, replica=replica: undone(replica))
        average(replicas, 1 / (ranks * case.accumulate))
        for rank, (replica, optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
            if case.clip is not None:
                seen[rank].read.append(clipped(replica, case.clip))
            optimizer.step()
            optimizer.zero_grad()
            if case.after is not None:
                seen[rank].read.append(case.after(replica, step))
    made = Reference(seen, before, parameters_of(first))
    if any(not torch.equal(made.after[name], p) for name, p in parameters_of(replicas[-1]).items()):
        raise ValueError("replicas end with different parameters: the case has no right answer")
    if not any(bool((before != made.after[name]).any()) for name, before in made.before.items()):
        raise ValueError("no parameter moved in the reference: the case compares nothing")
    return made


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """A micro-batch of one process; one that fails leaves the gradients as they were."""
    before = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter, grad in before.items():
        parameter.grad = None if grad is None else grad.clone()
    try:
        yield
    except Exception:
        for parameter, grad in before.items():
            parameter.grad = grad
        raise


def seeded(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.build()


def average(replicas: Sequence[nn.Module], scale: float) -> None:
    """Every replica's gradients become the sum over all times `scale`; one that nobody has stays None."""
    for parameters in zip(*(replica.parameters() for replica in replicas), strict=True):
        grads = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in parameters if p.grad is not None]
        for parameter in parameters if grads else ():
            total = grads[0].clone()
            for grad in grads[1:]:
                total += grad
            parameter.grad = total * scale


def optimizer_of(case: Case, parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=case.lr, momentum=MOMENTUM)


def losses_of(
    case: Case,
    model: nn.Module,
    step: int,
    rank: int,
    seen: Seen,
    around: Around,
) -> None:
    """Forward and backward of one step's micro-batches, each in `around(whether it is the last)`."""
    for number in range(step * case.accumulate, (step + 1) * case.accumulate):
        torch.manual_seed(100 * number + rank)  # dropout draws the same everywhere
        try:
            with around(number == (step + 1) * case.accumulate - 1):
                loss = case.loss(model, case.batch(number, rank), number, rank)
                loss.backward()  # type: ignore[no-untyped-call]
            seen.losses.append(loss.item())
        except case.skips:
            seen.losses.append(0.0)


def clipped(model: nn.Module, norm: float) -> float:
    return float(whole(nn.utils.clip_grad_norm_(model.parameters(), norm)))


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters by name, whole."""
    named = model.named_parameters()
    return {name.removeprefix("module."): whole(p.detach()).clone() for name, p in named if not is_lazy(p)}


def thinwire(case: Case, plan_name: str, world: World, seen: Seen) -> dict[str, Tensor]:
    """The case trained under a plan of thinwire; what it ended with."""
    model = seeded(case)
    # Modules this small would travel in one bucket: units move by themselves, as large ones do, unless the name says so.
    partition, _, how = plan_name.partition("/")
    config = PlanConfig(partition=partition, bucket_bytes=None if how == "buckets" else 0)
    plan = config.resolve(world.cluster, micro_batch=1, accumulate=case.accumulate)
    engine = shard(model, plan, world)
    optimizer = ShardedOptimizer(engine, lambda groups: optimizer_of(case, groups))
    for step in range(STEPS):
        losses_of(case, model, step, world.rank, seen, lambda last: engine.micro_batch(last=last))
        engine.finish_reduce()
        if case.clip is not None:
            seen.read.append(clipped(model, case.clip))
        optimizer.step(grad_scale=1 / (world.size * case.accumulate))
        if case.after is not None:
            seen.read.append(case.after(model, step))
    engine.drain()
    with engine.full_parameters():
        return parameters_of(model)


def peer(case: Case, name: str, rank: int, ranks: int, seen: Seen) -> dict[str, Tensor]:
    """The same with torch's own: DDP, or FSDP2 with the entries of module lists and the root as its units."""
    model, around = wrapped(case, name, ranks)
    optimizer = optimizer_of(case, [p for p in model.parameters() if p.requires_grad])
    for step in range(STEPS):
        losses_of(case, model, step, rank, seen, around)
        for parameter in model.parameters():
            if parameter.grad is not None and case.accumulate > 1:
                parameter.grad.mul_(1 / case.accumulate)
        if case.clip is not None:
            seen.read.append(clipped(model, case.clip))
        optimizer.step()
        optimizer.zero_grad()
        if case.after is not None:
            seen.read.append(case.after(model, step))
    return parameters_of(model)


def wrapped(case: Case, name: str, ranks: int) -> tuple[nn.Module, Around]:
    model = seeded(case)
    if name == "torch DDP":
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
        return ddp, lambda last: nullcontext() if last else ddp.no_sync()
    mesh = init_device_mesh("cpu", (ranks,))
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for entry in module:
                if any(True for _ in entry.parameters()) and type(entry).forward is not nn.ModuleList.forward:
                    fully_shard(entry, mesh=mesh)
    return fully_shard(model, mesh=mesh), lambda last: nullcontext()
