"""Real worlds of gloo ranks for tests: processes, one thread each, forked from a server that has torch loaded."""

import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from thinwire.cluster.cluster import Cluster, Level
from thinwire.train.launch import free_port
from warm import server

Levels = Sequence[int | tuple[str, int]]


def cluster_of(levels: Levels) -> Cluster:
    """A CPU cluster; plain numbers are named node, cluster, site, inner first."""
    names = ("node", "cluster", "site")
    pairs = [(names[i], level) if isinstance(level, int) else level for i, level in enumerate(levels)]
    return Cluster(levels=tuple(Level(name=name, fanout=fanout) for name, fanout in pairs))


def run_world(
    levels: int | Levels | Cluster,
    fn: Callable[..., Any],
    *args: Any,
    timeout_s: float = 120,
    sockets: Sequence[int] = (),
    patience_s: float = 60,
) -> list[Any]:
    """`fn(world, *args)` on every rank of a new world: the results by rank. Raises what a rank raised, or TimeoutError.

    All ranks are neighbours on this host; those of the levels in `sockets` talk as if they were not. Collectives wait for
    `patience_s`. Leaving the world checks that no handle was dropped.
    """
    cluster = levels if isinstance(levels, Cluster) else cluster_of([levels] if isinstance(levels, int) else levels)
    context = server()
    port = free_port()
    pipes, processes = [], []
    for rank in range(cluster.ranks):
        ours, theirs = context.Pipe(duplex=False)
        setting = (cluster, rank, port, sockets, patience_s)
        process = context.Process(target=_rank, args=(theirs, *setting, fn, args), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _results(pipes, timeout_s)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()


def _results(pipes: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    end_s = time.monotonic() + timeout_s
    while len(results) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], end_s - time.monotonic())
        if not ready:
            raise TimeoutError(f"ranks {sorted(set(range(len(pipes))) - set(results))} said nothing in {timeout_s} s")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                ok, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection,
    cluster: Cluster,
    rank: int,
    port: int,
    sockets: Sequence[int],
    patience_s: float,
    fn: Callable[..., Any],
    args: Any,
) -> None:
    import torch

    from thinwire.comm.world import World

    torch.set_num_threads(1)
    try:
        world = World.join(
            cluster, rank=rank, size=cluster.ranks, local_rank=rank, host="127.0.0.1", port=port, timeout_s=patience_s
        )
        result = fn(world.through_sockets(sockets), *args)
        world.leave()
        pipe.send_bytes(pickle.dumps((True, result)))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        pipe.close()
