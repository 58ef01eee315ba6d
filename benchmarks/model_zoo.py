"""Does `shard` train other people's models as one process would? Every causal-LM class of transformers, and modules with
one difficulty each, through every plan.

Each case is trained for three steps by real gloo ranks and compared with its single-process reference: losses, what is
read between steps, and the parameters at the end. A cell is `equal`; `refused`, if every rank raised a sentence before
anything differed; else `wrong`: other values, a crash, a hang, an error of another kind, a refusal by some ranks only.
Ranks live in processes of their own, so none of that ends the sweep. What does not train in one process is `no reference`.

    OMP_NUM_THREADS=1 python benchmarks/model_zoo.py --worlds 2 2x2 --peers --csv zoo.csv --md docs/benchmarks/model_zoo.md
    OMP_NUM_THREADS=1 python benchmarks/model_zoo.py --only 'hf/llama|experts' --plans zero3 --worlds 2/sockets
"""

import argparse
import itertools
import multiprocessing as mp
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

from zoo import rank as zoo_rank
from zoo.causal import causal_names
from zoo.cells import NO_REFERENCE, Cell, read, write
from zoo.compare import Report
from zoo.modules import modules
from zoo.table import page, totals
from zoo.training import PEERS

from thinwire.cluster.cluster import Cluster, Level
from thinwire.train.launch import free_port

PLANS = ("ddp", "zero1", "zero2", "zero3", "auto")
GRACE_S = 8.0
"""For the other ranks to say what became of them, once one has said that it is not equal."""
_PRELOADED = [
    "torch.distributed.fsdp",
    "torch.nn.parallel",
    "transformers.modeling_utils",
    "thinwire.parallel.shard.engine",
]


class Ranks:
    """The processes of one world, all with one case; they train it under one plan after the other."""

    def __init__(self, case: str, world: str, file: Path, *, torch_only: bool, timeout_s: float) -> None:
        self._timeout_s, self._met, self._well = timeout_s, False, False
        cluster, sockets = world_of(world)
        port, context = free_port(), mp.get_context("forkserver")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        self.logs = [file.with_name(f"log-{rank}") for rank in range(cluster.ranks)]
        for rank, log in enumerate(self.logs):
            log.unlink(missing_ok=True)
            ours, theirs = context.Pipe()
            args = (theirs, case, cluster, rank, port, sockets, file, log, torch_only)
            self.processes.append(context.Process(target=zoo_rank.rank_main, args=args, daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)

    def attempt(self, plan: str) -> tuple[str, str]:
        """(verdict, detail). After anything but equal these processes are of no more use."""
        self._well = False
        if not self._met and any(answer != "joined" for answer in self._answers(lambda answer: answer != "joined")):
            return "wrong", "the ranks did not meet"
        self._met = True
        for log in self.logs:
            log.write_bytes(b"")
        for pipe in self.pipes:
            pipe.send(plan)
        answers = self._answers(lambda answer: answer != Report())
        found = verdict([answer or self._silent(rank) for rank, answer in enumerate(answers)])
        self._well = found[0] == "equal"
        return found

    def _answers(self, bad: Any) -> list[Any]:
        """One per rank: None from those that died, hang, or were still waiting `GRACE_S` after another's bad answer."""
        answers: dict[int, Any] = {}
        end_s = time.monotonic() + self._timeout_s
        while len(answers) < len(self.pipes):
            open_ = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            ready = wait(open_, max(0.0, end_s - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    answers[rank] = None
                if bad(answers[rank]):
                    end_s = min(end_s, time.monotonic() + GRACE_S)
        return [answers.get(rank) for rank in range(len(self.pipes))]

    def _silent(self, rank: int) -> Report:
        """What became of a rank that has not answered."""
        process, log = self.processes[rank], self.logs[rank]
        process.join(0.5)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.3)
            return Report("hang", f"waits in {where(log.read_text(errors='replace'))}")
        name = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"exit {process.exitcode}"
        return Report("crash", f"{name} {last_words(log.read_text(errors='replace'))}".strip())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the world together, or, if something went wrong in it, end its processes."""
        for pipe in self.pipes if self._well else ():
            pipe.send(None)
        for process in self.processes:
            process.join(5 if self._well else 0)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        for pipe in self.pipes:
            pipe.close()


def verdict(reports: Sequence[Report]) -> tuple[str, str]:
    """One word for all ranks' reports, and the most telling of their reasons."""
    if all(report == Report() for report in reports):
        return "equal", ""
    refusals = [report for report in reports if report.refused]
    if len(refusals) == len(reports):
        return "refused", refusals[0].message
    differing = [f"rank {rank}: {report.differs}" for rank, report in enumerate(reports) if report.differs]
    others = [
        (rank, report)
        for rank, report in enumerate(reports)
        if report.error and not report.refused and not report.differs
    ]
    told = differing or [
        f"{report.error} on rank {rank}: {report.message}" for rank, report in others if report.error != "hang"
    ]
    told = told or [f"{report.error} on rank {rank}: {report.message}" for rank, report in others]
    if refusals:
        rank = next(rank for rank, report in enumerate(reports) if report.refused)
        return "wrong", f"refused by rank {rank} alone: {refusals[0].message}; {told[0] if told else 'another went on'}"
    raised = next(
        (f"; then {report.error}: {report.message}" for report in reports if report.error and report.differs), ""
    )
    return "wrong", (told[0] + raised) if told else "an error on some ranks only"


def where(log: str) -> str:
    """The innermost frame of thinwire in faulthandler's last dump, else the innermost of all."""
    frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', log[log.rfind("(most recent call first)") :])
    ours = [frame for frame in frames if "/thinwire/" in frame[0]] or frames or [("nowhere known", "", "")]
    return f"{Path(ours[0][0]).name}:{ours[0][1]} {ours[0][2]}"


def last_words(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if re.search(r"what\(\)|Error|EnforceNotMet|Fatal", line)]
    return lines[-1][:300] if lines else ""


def world_of(text: str) -> tuple[Cluster, list[int]]:
    """`2`, `2x2` (nodes by ranks of a node, written inner first), or with `/sockets`: no level talks through memory."""
    shape, _, how = text.partition("/")
    fanouts = [int(fanout) for fanout in shape.split("x")]
    levels = [Level(name=name, fanout=fanout) for name, fanout in zip(("node", "cluster"), fanouts, strict=False)]
    return Cluster(levels=tuple(levels)), list(range(len(levels))) if how == "sockets" else []


# -- the sweep ---------------------------------------------------------------------------------------------------------


def sweep(case: str, world: str, plans: Sequence[str], *, timeout_s: float) -> Iterator[Cell]:
    """The cells of one case on one world, torch's own trainers last."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reference"
        problem = make_reference(case, world_of(world)[0].ranks, file, 5 * timeout_s) if plans else ""
        if problem:
            yield Cell(case, world, "-", NO_REFERENCE, problem, 0.0)
            return
        for torch_only in (False, True):
            left = [plan for plan in plans if (plan in PEERS) == torch_only]
            while left:
                with Ranks(case, world, file, torch_only=torch_only, timeout_s=timeout_s) as ranks:
                    yield from until_not_equal(case, world, left, ranks)


def until_not_equal(case: str, world: str, left: list[str], ranks: Ranks) -> Iterator[Cell]:
    """Takes plans from `left` until there are none or one was not equal, after which the ranks are of no more use."""
    verdict_ = "equal"
    while left and verdict_ == "equal":
        started_s = time.monotonic()
        verdict_, detail = ranks.attempt(left[0])
        yield Cell(case, world, left.pop(0), verdict_, detail, round(time.monotonic() - started_s, 2))


def make_reference(case: str, ranks: int, file: Path, timeout_s: float) -> str:
    """Trains the case in one process. What went wrong, or nothing."""
    context = mp.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=zoo_rank.reference_main, args=(theirs, case, ranks, file, file.with_name("log")))
    process.start()
    theirs.close()
    try:
        said = str(ours.recv()) if ours.poll(timeout_s) else f"took more than {timeout_s:g} s"
    except EOFError:
        said = "the process died"
    process.join(2)
    process.kill()
    process.join()
    return " ".join(said.split())


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the ranks are ended too
    mp.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    cells = read(options.csv) if options.csv and options.resume else []
    done = {(cell.case, cell.world, cell.plan) for cell in cells}
    names = [name for name in [*modules(), *causal_names()[0]] if re.search(options.only, name)][: options.limit]
    plans = [*options.plans, *(PEERS if options.peers else ())]
    for number, (name, world) in enumerate(itertools.product(names, options.worlds)):
        left = [plan for plan in plans if (name, world, plan) not in done and (name, world, "-") not in done]
        for cell in sweep(name, world, left, timeout_s=options.timeout):
            cells.append(cell)
            told = f"{cell.case} {cell.world} {cell.plan}: {cell.verdict} {cell.detail[:160]}"
            print(f"{number + 1}/{len(names) * len(options.worlds)} {told}", flush=True)
            if options.csv:
                write(options.csv, cells)
    command = " ".join(["python benchmarks/model_zoo.py", *sys.argv[1:]])
    if options.md:
        earlier = read(options.before) if options.before else []
        options.md.write_text(page(cells, earlier, command), encoding="utf-8")
    print("\n\n".join(totals(cells, {})))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="a regular expression that a case's name contains")
    parser.add_argument("--plans", nargs="*", default=list(PLANS), help=f"default: {' '.join(PLANS)}; PLAN/buckets too")
    parser.add_argument("--worlds", nargs="*", default=["2", "2x2"], help="ranks of each level, inner first; /sockets")
    parser.add_argument("--peers", action="store_true", help="torch's DDP and FSDP2 too")
    parser.add_argument("--limit", type=int, default=None, help="at most so many cases")
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds of one cell; of a reference five times as many"
    )
    parser.add_argument("--csv", type=Path, help="write every cell here as it comes")
    parser.add_argument("--resume", action="store_true", help="keep the cells that --csv has")
    parser.add_argument("--md", type=Path, help="write the table here")
    parser.add_argument("--before", type=Path, help="the --csv of an earlier sweep, to compare with in --md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
