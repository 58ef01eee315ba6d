"""The processes of a sweep: one that makes a case's reference, and the ranks that train it under one plan after another."""

import faulthandler
import os
import pickle
import signal
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from thinwire import Cluster, World
from zoo.cases import Case
from zoo.causal import causal_case
from zoo.compare import REFUSALS, Reference, Report, Seen, difference
from zoo.modules import modules
from zoo.training import peer, reference, thinwire


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
        report = attempt(case, plan, world, rank, cluster.ranks, known)
        pipe.send(report)
        if report.error:
            os._exit(1)  # as a program that does not catch it: its connections close
    if world is not None:
        world.leave()


def attempt(case: Case, plan: str, world: World | None, rank: int, ranks: int, known: Reference) -> Report:
    seen, ended, report = Seen(), None, Report()
    try:
        ended = peer(case, plan, rank, ranks, seen) if world is None else thinwire(case, plan, world, seen)
    except BaseException as error:
        traceback.print_exc()
        report.error, report.message = type(error).__name__, " ".join(str(error).split())
        if report.error not in REFUSALS:
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
