"""What one sees of a run: a progress line, `events.jsonl`, trackers, and a table at the end. Rank 0 only.

Small numbers about the machine and the model that the progress line needs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from thinwire.cluster.cluster import Device
from thinwire.comm.ledger import Entry
from thinwire.files.events import EventLog
from thinwire.train.clock import Lap, Tracer
from thinwire.train.folder import EVENTS_FILE, TRACE_FILE
from thinwire.train.job import Job
from thinwire.train.trackers import Tracker, open_trackers
from thinwire.units import show_count, show_seconds

_SMOOTHING = 0.9


class Telemetry:
    """Writes every step to the log and the trackers; shows a live line on a terminal, a plain line elsewhere."""

    def __init__(
        self,
        folder: Path,
        trackers: Mapping[str, Tracker],
        *,
        total_steps: int,
        first_step: int,
        log_every: int,
        no_loss: str,
    ) -> None:
        """`no_loss`: what the line says of a step without one."""
        self.console = Console(highlight=False)
        self.log = EventLog(folder / EVENTS_FILE)
        self._trackers = dict(trackers)
        self._total_steps, self._log_every, self._no_loss = total_steps, log_every, no_loss
        self._step_s: float | None = None
        self._live = self.console.is_terminal
        self._progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"),
            console=self.console,
            auto_refresh=False,
            disable=not self._live,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=first_step, line="")
        self._progress.start()

    def step(self, record: dict[str, Any]) -> None:
        """Say what step `record["step"]` (1 is the first) did."""
        self._write("step", **record)
        number = record["step"]
        names = ("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "step_s")
        values = {f"train/{name}": record[name] for name in names if record[name] is not None}
        self._track(values | {f"seconds/{cause}": seconds for cause, seconds in record["seconds"].items()}, number)
        smooth = self._step_s
        self._step_s = record["step_s"] if smooth is None else _SMOOTHING * smooth + (1 - _SMOOTHING) * record["step_s"]
        line = self._line(record)
        self._progress.update(self._task, completed=number, line=line, refresh=self._live)
        if not self._live and (number % self._log_every == 0 or number == self._total_steps):
            self.console.print(f"step {number}/{self._total_steps}  {line}", soft_wrap=True)

    def _track(self, values: Mapping[str, float], step: int) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(values, step)
            except Exception as error:
                del self._trackers[name]
                self.warn(f"{name} takes no more records from step {step} on: {error}; the run goes on without it")

    def _line(self, record: dict[str, Any]) -> str:
        exposed = record["seconds"]["comm"] / max(record["step_s"], 1e-9)
        left_s = (self._total_steps - record["step"]) * (self._step_s or 0.0)
        mfu = "" if record["mfu"] is None else f"  MFU {record['mfu']:.1%}"
        loss = self._no_loss if record["loss"] is None else f"loss {record['loss']:.4f}"
        return (
            f"{loss}  {show_count(record['tokens_per_s'])} tokens/s{mfu}  "
            f"exposed comm {exposed:.1%}  ETA {show_seconds(left_s)}"
        )

    def event(self, kind: str, **fields: Any) -> None:
        """A record of another kind in the log; validation losses go to the trackers too."""
        self._write(kind, **fields)
        if kind == "eval":
            shown = {f"eval/{name}": fields[name] for name in ("loss", "bits_per_byte") if fields.get(name) is not None}
            self._track(shown, fields["step"])

    def say(self, text: str, style: str = "") -> None:
        """A line above the progress line."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        """A table above the progress line."""
        self.console.print(table)

    def show_text(self, title: str, text: str) -> None:
        """Text between two rules."""
        self.console.rule(title, align="left")
        self.console.print(text, markup=False, highlight=False)
        self.console.rule()

    def warn(self, text: str) -> None:
        """Something that does not end the run but that a person should see, and find again in the log."""
        self._write("fault", message=text)
        self._say_warning(text)

    def _write(self, kind: str, **fields: Any) -> None:
        """A record in the log. One that cannot be written waits; that is told once."""
        fine = self.log.refused is None
        self.log.write(kind, **fields)
        if fine and self.log.refused is not None:
            self._say_warning(
                f"{EVENTS_FILE} cannot be written: {self.log.refused}; training goes on, and what it says is kept in memory "
                f"until there is room"
            )

    def _say_warning(self, text: str) -> None:
        self.say(f"warning: {text}", "yellow")

    def stop_line(self) -> None:
        """Leave the progress line as it stands; what follows is printed below it."""
        self._progress.stop()

    def close(self) -> None:
        self._progress.stop()
        for name, tracker in self._trackers.items():
            try:
                tracker.close()
            except Exception as error:
                self.warn(f"{name} could not be closed: {error}; its last records may be missing")
        if gone := self.log.waiting + self.log.lost:
            self._say_warning(
                f"{gone:,} records of {EVENTS_FILE} could not be written: {self.log.refused}; they are lost"
            )
        self.log.close()


class Totals:
    """Sums over the steps of this start of a run, for the table at its end."""

    def __init__(self) -> None:
        self.steps, self.tokens, self.scored, self.seconds = 0, 0, 0, 0.0
        self.unscored_steps = 0
        self.wire: dict[str, dict[str, int]] = {}
        self.causes: dict[str, float] = {}

    def add(self, record: dict[str, Any]) -> None:
        self.steps += 1
        self.tokens += record["processed_tokens"]
        self.scored += record["tokens"]
        self.unscored_steps += record["loss"] is None and record["skipped"]
        self.seconds += record["step_s"]
        for level, purposes in record["wire"].items():
            of_level = self.wire.setdefault(level, {})
            for purpose, count in purposes.items():
                of_level[purpose] = of_level.get(purpose, 0) + count
        for cause, seconds in record["seconds"].items():
            self.causes[cause] = self.causes.get(cause, 0.0) + seconds

    def table(self, rows: dict[str, str]) -> Table:
        """The summary: `rows` first, then what was counted."""
        table = Table(show_header=False, title="summary", title_justify="left")
        counted = {
            "steps in this start": f"{self.steps:,}",
            "tokens": f"{self.tokens:,}" + (f", {self.scored:,} of them scored" if self.scored < self.tokens else ""),
            "training time": show_seconds(self.seconds),
            "tokens per second": f"{self.tokens / max(self.seconds, 1e-9):,.0f}",
            "time by cause": "  ".join(
                f"{cause} {seconds / max(self.seconds, 1e-9):.1%}"
                for cause, seconds in self.causes.items()
                if seconds > 0
            ),
        }
        if self.unscored_steps:
            counted["steps not taken"] = f"{self.unscored_steps:,}, of which no token was scored"
        for name, value in {**rows, **counted}.items():
            table.add_row(name, value)
        return table


class Reporter:
    """What every rank of a run reports to: rank 0's is opened and writes and shows it, the others' keep quiet."""

    def __init__(self) -> None:
        self.totals = Totals()
        self._telemetry: Telemetry | None = None
        self._tracer: Tracer | None = None

    @property
    def speaks(self) -> bool:
        """Whether what is reported is seen by anybody."""
        return self._telemetry is not None

    def open(self, job: Job, *, step: int) -> None:
        """Begin to write and show `job` from `step` on. On rank 0."""
        run, tracking = job.config.run, job.config.tracking
        trackers = open_trackers(tracking, job.folder, first_step=step, settings=job.config.model_dump(mode="json"))
        self._telemetry = Telemetry(
            job.folder,
            trackers,
            total_steps=run.steps,
            first_step=step,
            log_every=run.log_every,
            no_loss="emulated compute, no loss" if job.emulated else "no scored token, no step",
        )
        self._tracer = Tracer(job.folder / TRACE_FILE, first_step=step, count=run.trace_steps)

    def step(self, record: dict[str, Any], laps: Sequence[Lap], entries: Sequence[Entry]) -> None:
        """A step is over: publish its record, and its course if it is one of those that are traced."""
        if self._telemetry is not None:
            self.totals.add(record)
            self._telemetry.step(record)
        self._trace(lambda tracer: tracer.step(record["step"], laps, entries))

    def event(self, kind: str, **fields: Any) -> None:
        if self._telemetry is not None:
            self._telemetry.event(kind, **fields)

    def say(self, text: str) -> None:
        if self._telemetry is not None:
            self._telemetry.say(text)

    def warn(self, text: str) -> None:
        if self._telemetry is not None:
            self._telemetry.warn(text)

    def show(self, table: Table) -> None:
        if self._telemetry is not None:
            self._telemetry.show(table)

    def conclude(self, tables: Sequence[Table], sample: str | None) -> None:
        """Leave the progress line as it stands; below it tables, and text that the model wrote."""
        if self._telemetry is not None:
            self._telemetry.stop_line()
            for table in tables:
                self._telemetry.show(table)
            if sample is not None:
                self._telemetry.show_text("sample", sample)

    def close(self) -> None:
        self._trace(Tracer.close)
        if self._telemetry is not None:
            self._telemetry.close()

    def _trace(self, act: Callable[[Tracer], None]) -> None:
        if self._tracer is None:
            return
        try:
            act(self._tracer)
        except OSError as error:
            self._tracer = None
            self.warn(f"{TRACE_FILE} cannot be written: {error.strerror or error}; the run goes on without it")


_PROBE_SIZE, _PROBE_S = {"cpu": 256, "cuda": 4096}, 0.15
"""Rows of a square matrix: on a CPU it stays in the cache, and a product ends before another process has its turn."""


def peak_flops_per_s(device: Device, dtype: torch.dtype) -> tuple[float, str]:
    """`(FLOP per second, "default" | "given" | "measured")` of one rank, the denominator of MFU.

    A CPU has no published figure that fits one thread of it, so a square matrix product is timed instead.
    """
    if device.peak_flops_per_s is not None:
        return device.peak_flops_per_s, device.origin
    where = "cuda" if device.kind == "cuda" else "cpu"
    size = _PROBE_SIZE[where]
    a = torch.rand(size, size, dtype=dtype, device=where)
    a @ a  # the first product loads libraries and starts threads, which may take longer than all the others
    best_s, end_s = float("inf"), time.perf_counter() + _PROBE_S
    while time.perf_counter() < end_s:
        start_s = time.perf_counter()
        a @ a
        if where == "cuda":
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * size**3 / best_s, "measured"


class CountsFlops(Protocol):
    """A spec that knows the FLOPs of forward and backward per token in a sequence of `tokens`, or that it does not."""

    def model_flops_per_token(self, tokens: int) -> float | None: ...


def mfu(spec: CountsFlops, *, tokens_per_sequence: int, tokens_per_s: float, ranks: int, peak: float) -> float | None:
    """Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B): recomputed activations do not count.

    None if the model's FLOPs are not known.
    """
    flops = spec.model_flops_per_token(tokens_per_sequence)
    return None if flops is None else round(flops * tokens_per_s / (ranks * peak), 5)
