"""One process of a model zoo's run: the single-process reference of a case, or one rank of its training under a plan.

The reference is one replica of the module for each rank, trained in one process: gradients are averaged over replicas in
rank order, and each replica takes the same step. So everything that a rank keeps to itself (batch statistics, weights
that a forward writes) is compared with what that rank alone would have.
"""

import faulthandler
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parameter import is_lazy

from thinwire import Cluster, ShardedOptimizer, World, shard
from thinwire.errors import ConfigError, PlanError, UseError
from thinwire.plan import PlanConfig
from zoo.cases import Case
from zoo.causal import causal_case
from zoo.modules import modules

STEPS, MOMENTUM = 3, 0.9
LOSS_TOLERANCE, STEP_TOLERANCE = 1e-5, 1e-3
"""Relative, of a loss; and of the largest change of a parameter over the run, the same for what is read after a step."""
PEERS = ("torch DDP", "FSDP2")


@dataclass
class Seen:
    """What one rank saw of a training: a loss for each micro-batch, a number for each step if the case reads one."""

    losses: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)


@dataclass
class Reference:
    """What every rank should see, and the parameters before and after; all of one replica if replicas are equal."""

    seen: list[Seen]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


@dataclass
class Report:
    """How a rank's training went: nothing wrong if all three are empty."""

    error: str = ""
    """The class of what was raised."""
    message: str = ""
    differs: str = ""
    """The first thing that is not as in the reference."""

    @property
    def refused(self) -> bool:
        return self.error in {kind.__name__ for kind in (UseError, PlanError, ConfigError)} and not self.differs


# -- the reference -----------------------------------------------------------------------------------------------------


def reference(case: Case, ranks: int) -> Reference:
    """The case trained in this process alone. Raises whatever the module raises."""
    torch.manual_seed(0)
    first = case.build()
    torch.manual_seed(0)
    replicas = [first, *(case.build() for _ in range(ranks - 1))]
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
    around: Callable[[bool], AbstractContextManager[Any]],
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
    total = nn.utils.clip_grad_norm_(model.parameters(), norm)
    return float(total.full_tensor() if hasattr(total, "full_tensor") else total)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters by name, whole."""
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    return {name.removeprefix("module."): p.detach().clone() for name, p in whole.items() if not is_lazy(p)}


# -- sides -------------------------------------------------------------------------------------------------------------


def thinwire(case: Case, plan_name: str, world: World, seen: Seen) -> dict[str, Tensor]:
    """The case trained under a plan of thinwire; what it ended with."""
    model = case.build()
    plan = PlanConfig(partition=plan_name).resolve(world.cluster, micro_batch=1, accumulate=case.accumulate)
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


def wrapped(case: Case, name: str, ranks: int) -> tuple[nn.Module, Callable[[bool], AbstractContextManager[Any]]]:
    model = case.build()
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


# -- comparing ---------------------------------------------------------------------------------------------------------


def difference(seen: Seen, ended: Mapping[str, Tensor] | None, known: Reference, rank: int) -> str:
    """The first thing that differs from the reference, in the order of the run; empty if nothing does.

    Without `ended` the run broke off: only what was seen until then is compared.
    """
    for what, ours, theirs in (
        ("loss", seen.losses, known.seen[rank].losses),
        ("number read after a step", seen.read, known.seen[rank].read),
    ):
        for number, (got, right) in enumerate(zip(ours, theirs, strict=False)):
            tolerance = LOSS_TOLERANCE if what == "loss" else STEP_TOLERANCE
            if not abs(got - right) <= tolerance * max(abs(right), 1e-3):
                return f"{what} {number}: {got:.6g}, should be {right:.6g}"
    if ended is None:
        return ""
    return parameters_differ(ended, known) or steps_missing(seen, known, rank)


def parameters_differ(ended: Mapping[str, Tensor], known: Reference) -> str:
    if set(ended) != set(known.after):
        return f"parameters {sorted(set(ended) ^ set(known.after))[:3]} are missing or new"
    worst, named = 0.0, ""
    for name, right in known.after.items():
        got, before = ended[name], known.before.get(name, torch.zeros_like(right))  # a lazy one has none before
        if got.shape != right.shape or got.dtype != right.dtype:
            return f"{name}: {tuple(got.shape)} of {got.dtype}, should be {tuple(right.shape)} of {right.dtype}"
        if right.numel() == 0 or torch.equal(got, right):
            continue
        off, moved = (got - right).abs().max().item(), (right - before).abs().max().item()
        share = off / (STEP_TOLERANCE * moved + 1e-7)
        if not share <= max(worst, 1.0):
            worst, named = share, f"{name}: off by {off:.3g}, it moved by {moved:.3g}"
    return named


def steps_missing(seen: Seen, known: Reference, rank: int) -> str:
    right = known.seen[rank]
    return "" if len(seen.losses) == len(right.losses) and len(seen.read) == len(right.read) else "a step is missing"


# -- processes ---------------------------------------------------------------------------------------------------------


def case_named(name: str) -> Case:
    if name.startswith("hf/"):
        return causal_case(name.removeprefix("hf/"))
    return modules()[name]


def reference_main(pipe: Connection, name: str, ranks: int, file: Path, log: Path) -> None:
    """Writes the reference to `file`; sends what went wrong, or nothing."""
    _prepare(log)
    try:
        file.write_bytes(pickle.dumps(reference(case_named(name), ranks)))
        pipe.send("")
    except BaseException as error:
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {error}")


def rank_main(
    pipe: Connection, name: str, cluster: Cluster, rank: int, port: int, sockets: Sequence[int], file: Path, log: Path,
    torch_only: bool,
) -> None:  # fmt: skip
    """Joins a world, then trains the case under every plan that comes through the pipe, and answers with a Report."""
    _prepare(log)
    case, world = case_named(name), None
    known: Reference = pickle.loads(file.read_bytes())
    if torch_only:
        store = dist.TCPStore("127.0.0.1", port, cluster.ranks, is_master=rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=cluster.ranks)
    else:
        world = World.join(
            cluster, rank=rank, size=cluster.ranks, local_rank=rank, host="127.0.0.1", port=port, timeout_s=600
        ).through_sockets(sockets)
    pipe.send("joined")
    while (plan := pipe.recv()) is not None:
        pipe.send(attempt(case, plan, world, rank, cluster.ranks, known))
    if world is not None:
        world.leave()


def attempt(case: Case, plan: str, world: World | None, rank: int, ranks: int, known: Reference) -> Report:
    seen, ended, report = Seen(), None, Report()
    torch.manual_seed(0)
    try:
        ended = peer(case, plan, rank, ranks, seen) if world is None else thinwire(case, plan, world, seen)
    except BaseException as error:
        traceback.print_exc()
        report.error, report.message = type(error).__name__, " ".join(str(error).split())
        if not isinstance(error, UseError | PlanError | ConfigError):
            report.message += f" ({place_of(error)})"
    report.differs = difference(seen, ended, known, rank)
    return report


def place_of(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "thinwire" in frame.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}"


def _prepare(log: Path) -> None:
    """One thread, what is printed goes to `log`, and SIGUSR1 writes there where this process is."""
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.register(signal.SIGUSR1, file=os.fdopen(descriptor, "a"), all_threads=False)
