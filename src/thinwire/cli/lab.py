"""`thinwire lab`: an emulated cluster with slow links on this machine; any command, or a training run, on it.

A training run is checked before anything is built, then `thinwire train` runs as every rank.
"""

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated

import typer

from thinwire.cli.emulated import emulated_compute, setting_of
from thinwire.cluster.cluster import Cluster, show_levels
from thinwire.config import show_text
from thinwire.errors import ConfigError
from thinwire.lab.config import LabConfig, read_lab
from thinwire.lab.host import find, remove
from thinwire.lab.lab import Lab
from thinwire.lab.network import commands, described, host_name, in_a_line
from thinwire.lab.outcome import LabOutcome, RankEnd, Traffic
from thinwire.train.folder import EVENTS_FILE, open_folder
from thinwire.train.job import Job, read_config, resolve
from thinwire.units import show_seconds


@dataclass(frozen=True)
class Training:
    """A run that fits a lab."""

    run_file: Path
    settings: list[str]
    job: Job

    @staticmethod
    def check(
        run_file: Path, settings: list[str], config: LabConfig, *, compute: str | None = None, slow: Sequence[str] = ()
    ) -> "Training":
        """Read and resolve the run file (its corpus is made on first use); `compute` real, emulated, or None: as it says.

        Raises what `thinwire train` raises, and ConfigError if its levels are not the lab's hosts and ranks.
        """
        run = read_config(run_file, settings)
        check_levels(run.cluster.resolve(run_file.parent), config)
        if compute is not None and run.compute is not None:
            raise ConfigError("the run file has a [compute] of its own; leave --compute out to run it, or take it out")
        job = resolve(run_file, run, prepare=True)
        if compute == "emulated":
            settings = [*settings, setting_of(emulated_compute(job, slow))]
            job = resolve(run_file, read_config(run_file, settings))
        return Training(run_file, settings, job)

    @property
    def folder(self) -> Path:
        return self.job.folder

    @property
    def events(self) -> Path:
        return self.job.folder / EVENTS_FILE

    def begin(self, *, fresh: bool) -> list[str]:
        """Make or re-open the run folder; the command of every rank. Raises ConfigError."""
        open_folder(self.job, fresh=fresh).lock.release()  # rank 0 opens it again, and holds it
        overrides = [word for setting in self.settings for word in ("--set", setting)]
        start = [sys.executable, "-c", "from thinwire.cli import main; main()"]
        return [*start, "train", str(self.run_file), *overrides]


def check_levels(cluster: Cluster, config: LabConfig) -> None:
    """Raise ConfigError unless the run's ranks are the lab's and no level crosses the edge of a host or a site."""
    ends = {cluster.ranks_within(index) for index in range(-1, len(cluster.levels))}
    edges = {"host": config.ranks_per_host, "lab": config.ranks}
    if config.hosts_per_site is not None:
        edges["site"] = config.hosts_per_site * config.ranks_per_host
    if cluster.ranks == config.ranks and all(edge in ends for edge in edges.values()):
        return
    levels = show_levels(cluster.shape)
    inner = [config.ranks_per_host, config.hosts_per_site or config.hosts]
    fitting = [*inner, config.sites] if config.sites else inner
    named = ", ".join(
        f"{{name='{name}', fanout={fanout}}}"
        for name, fanout in zip(("node", "cluster", "site"), fitting, strict=False)
        if fanout > 1 or len(fitting) == 1
    )
    raise ConfigError(
        f"the run's levels {levels} make {cluster.ranks} ranks and do not fit {config.hosts} hosts x "
        f'{config.ranks_per_host} ranks; try --set "cluster.levels=[{named or "1"}]"'
    )


app = typer.Typer(
    help="An emulated cluster with slow links on one Linux machine.", no_args_is_help=True, rich_markup_mode=None
)
_LAB = typer.Argument(metavar="LAB.toml", help="Hosts, ranks, rates, faults.")
_JSON = typer.Option("--json", help="Print the result as JSON.")
_INTERRUPTED_STATUS = 130


@app.command()
def run(
    lab_file: Annotated[Path, _LAB],
    command: Annotated[list[str] | None, typer.Argument(metavar="-- COMMAND...", help="What every rank runs.")] = None,
    train: Annotated[Path | None, typer.Option(metavar="RUN.toml", help="Train this run instead of a command.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key of RUN.toml; may be repeated."),
    ] = None,
    lab_settings: Annotated[
        list[str] | None,
        typer.Option("--lab", metavar="KEY=VALUE", help="Override a key of LAB.toml; may be repeated."),
    ] = None,
    compute: Annotated[
        str | None,
        typer.Option(metavar="WORD", help="With --train: real, or emulated: ranks sleep, nothing is trained."),
    ] = None,
    slow: Annotated[
        list[str] | None,
        typer.Option(metavar="RANK=FACTOR", help="With --compute emulated: a rank takes longer; may be repeated."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="With --train: put an existing run aside.")] = False,
    per_host: Annotated[bool, typer.Option("--per-host", help="Run COMMAND once a host, as with torchrun.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the logs; default runs/lab/NAME.")] = None,
    events: Annotated[Path | None, typer.Option(help="The events.jsonl that faults with at_step follow.")] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Do not stop the others when a rank fails.")] = False,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Stop everything after this long.")] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Run COMMAND as every rank of the cluster that LAB.toml describes, or train RUN.toml on it.

    Rank 0's output is shown; every rank's is in the logs. Ctrl-C asks the ranks to stop, a second one ends everything.

    With --compute emulated ranks send what they would, and sleep for as long as the run's cluster.device is predicted to
    compute: many ranks on few cores then take the time that they would take on devices of their own.

    Example: thinwire lab run examples/lab/two-hosts.toml -- python train.py
    """
    if (train is None) == (not command):
        raise ConfigError("give a command after `--`, or --train RUN.toml: one of the two")
    if compute not in (None, "real", "emulated"):
        raise ConfigError(f"--compute {show_text(compute)} is unknown; there are real and emulated")
    if compute is not None and train is None:
        raise ConfigError("--compute is about what a training run computes, not a command; give --train RUN.toml")
    if slow and compute != "emulated":
        raise ConfigError("--slow is how long ranks sleep; give --compute emulated with it")
    if train is None and (settings or fresh):
        raise ConfigError("--set and --fresh belong to --train; override keys of LAB.toml with --lab")
    config = read_lab(lab_file, tuple(lab_settings or ()))
    if train is not None:
        if per_host:
            raise ConfigError("--per-host is for a COMMAND that starts ranks itself; --train starts every rank")
        training = Training.check(train, settings or [], config, compute=compute, slow=slow or [])
        folder, events = out or training.folder / "lab", events or training.events
    else:
        folder = out or Path("runs/lab") / lab_file.stem
    with Lab(config, folder=folder, say=_note) as lab:
        if train is not None:
            command = training.begin(fresh=fresh)
        _note(f"{in_a_line(config)}; logs in {folder}")
        lab.start(command or [], per_host=per_host, events=events)
        outcome, interrupted = _watch(lab, timeout_s=timeout, keep_going=keep_going, echo=not as_json)
    _report(outcome, as_json=as_json)
    sys.exit(_INTERRUPTED_STATUS if interrupted else 0 if outcome.ok else 1)


@app.command()
def show(lab_file: Annotated[Path, _LAB], as_json: Annotated[bool, _JSON] = False) -> None:
    """What `run` would build, down to every command; nothing is built.

    Example: thinwire lab show examples/lab/two-hosts.toml
    """
    config = read_lab(lab_file)
    congestion = config.congestion or "cubic"
    if as_json:
        listed = [{"host": command.host, "argv": command.argv} for command in commands(config, congestion)]
        typer.echo(json.dumps({"lab": config.model_dump(mode="json"), "commands": listed}))
    else:
        for line in described(config, congestion):
            typer.echo(line)


@app.command()
def clean(
    everything: Annotated[bool, typer.Option("--all", help="Labs in use too.")] = False,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Remove what labs whose owner is dead left behind: processes, namespaces, temporary logs. Nothing else.

    Example: thinwire lab clean
    """
    found = find()
    doomed = [lab for lab in found if everything or not lab.alive]
    for lab in doomed:
        remove(lab)
    kept = [lab.name for lab in found if lab not in doomed]
    if as_json:
        typer.echo(json.dumps({"removed": [lab.name for lab in doomed], "kept": kept}))
        return
    for lab in doomed:
        typer.echo(f"removed {lab.name}")
    for name in kept:
        typer.echo(f"kept {name}: in use (--all removes it too)")
    if not found:
        typer.echo("no lab is left over")


class _Stops:
    """Counts requests to stop while a command runs."""

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.asked = 0

    def __enter__(self) -> "_Stops":
        self._before = {number: signal.signal(number, self._on_signal) for number in self._NUMBERS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        self.asked += 1


def _watch(lab: Lab, *, timeout_s: float | None, keep_going: bool, echo: bool) -> tuple[LabOutcome, bool]:
    """Wait for the end, show the first process's output meanwhile, pass stops on. The outcome, and if it was stopped."""
    running, passed_on = lab.running, 0
    follow = Follow(running.first_log, sys.stdout.buffer) if echo else None
    with _Stops() as stops:

        def each_look() -> None:
            nonlocal passed_on
            if follow is not None:
                follow.look()
            if stops.asked > passed_on:
                passed_on = stops.asked
                if passed_on == 1:
                    _note("asking the ranks to stop; once more to end them now")
                    running.interrupt(signal.SIGINT)
                else:
                    running.kill()

        return running.wait(timeout_s=timeout_s, keep_going=keep_going, each_look=each_look), stops.asked > 0


def _report(outcome: LabOutcome, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(outcome.as_dict()))
    else:
        for line in summary(outcome):
            _note(line)
    if outcome.first_failure is not None:
        typer.echo(f"thinwire: {failure(outcome.first_failure)}", err=True)


def _note(line: str) -> None:
    typer.echo(f"lab: {line}", err=True)


class Follow:
    """Copies what was appended to `path` since the last look to `out`."""

    def __init__(self, path: Path, out: IO[bytes]) -> None:
        self._path, self._out, self._offset = path, out, 0

    def look(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        if new:
            self._offset += len(new)
            self._out.write(new)
            self._out.flush()


def summary(outcome: LabOutcome) -> Iterator[str]:
    """Time and bytes by link; then who ended otherwise than well."""
    yield f"ended after {show_seconds(outcome.wall_s)}; by the kernel's counters of each link:"
    for host, link in enumerate(outcome.traffic.hosts):
        yield f"  {host_name(host)}  {_traffic(link)}"
    for site, link in enumerate(outcome.traffic.sites):
        yield f"  site{site}  {_traffic(link)}"
    for end in outcome.ends:
        if end.exit_status or end.by != "itself":
            yield f"  {end.who} {how(end)}"


def how(end: RankEnd) -> str:
    """`"was killed by signal 9 (by a fault)"`."""
    what = f"was ended by signal {-end.exit_status}" if end.exit_status < 0 else f"ended with status {end.exit_status}"
    return what + {"itself": "", "fault": " (by a fault)", "lab": " (stopped by the lab)"}[end.by]


def failure(end: RankEnd) -> str:
    """Who failed first, and its last words."""
    tail = end.tail()
    words = f"; the end of {end.log}:\n{tail}" if tail else f"; {end.log} is empty"
    return f"{end.who} {how(end)}, first of all{words}"


def _traffic(link: Traffic) -> str:
    return f"sent {link.sent_bytes / 1e6:,.3f} MB, received {link.received_bytes / 1e6:,.3f} MB"
