"""`Lab`: build an emulated cluster, run commands on it, count bytes, inject faults.

with Lab(LabConfig(hosts=2, ranks_per_host=2, host_rate=12.5e6)) as lab:
    lab.start([sys.executable, "train.py"])
    outcome = lab.wait()
    print(outcome.ok, lab.counters().hosts[0].sent_bytes)
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from thinwire.errors import ConfigError, LabError
from thinwire.lab import network
from thinwire.lab.command import FIRST_PORT, Running, members
from thinwire.lab.config import Fault, LabConfig, available_memory_bytes, check_memory, checked_rate, choose_congestion
from thinwire.lab.host import Inside, check_machine, new_name, search_path, why_command_failed
from thinwire.lab.network import Command
from thinwire.lab.outcome import Counters, LabOutcome, Traffic

_AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")


class Lab:
    """An emulated cluster; a context, which leaves no namespace and no process behind, however it is left.

    `folder` takes the logs (default: a temporary one that goes with the lab). `rootless` True makes a user namespace
    even for root, False never does; by default only those without the right to administrate get one. `say` is told of
    every fault. Entering raises ConfigError (more ranks than memory, a delay without netem) and LabError (something is
    missing on this machine).
    """

    def __init__(
        self,
        config: LabConfig,
        *,
        folder: Path | None = None,
        rootless: bool | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.config, self._given_folder, self._rootless, self._say = config, folder, rootless, say
        self.name = new_name()
        """What the lab is called in the list of processes."""
        self._inside: Inside | None = None
        self._running: Running | None = None
        self._commands = 0

    def __enter__(self) -> "Lab":
        check_machine(os.environ)
        check_memory(self.config, available_memory_bytes(Path("/proc/meminfo").read_text(encoding="ascii")))
        self._congestion = choose_congestion(self.config, _AVAILABLE.read_text(encoding="ascii").split())
        self.folder = self._given_folder or Path(tempfile.gettempdir()) / self.name
        try:
            self._inside = Inside.open(self.name, rootless=self._rootless)
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._inside is not None:
            self._inside.close()
            self._inside = None
        if self._given_folder is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def start(
        self,
        command: Sequence[str],
        *,
        per_host: bool = False,
        environment: Mapping[str, str] | None = None,
        faults: Sequence[Fault] | None = None,
        events: Path | None = None,
    ) -> Running:
        """Start `command` as every rank (or, `per_host`, once on every host) and return at once.

        Each process finds its place in RANK, WORLD_SIZE, MASTER_ADDR and their like; its output goes to
        `folder/rank-N.log`. `environment` adds to this process's own. `faults` and `events` default to the
        configuration's. Raises ConfigError if there is no such program, LabError if a command is still running.
        """
        if self._running is not None and not self._running.over:
            raise LabError("a command is still running on the lab; wait for it or stop it first")
        path = {**os.environ, **(environment or {})}.get("PATH", "")
        if not command or shutil.which(command[0], path=search_path(path)) is None:
            raise ConfigError(
                f"there is no program {command[0]!r} to run on the lab" if command else "no command given"
            )
        chosen = self.config.faults if faults is None else faults
        if events is None and self.config.events is None and any(fault.at_step is not None for fault in chosen):
            raise ConfigError("a fault has at_step, but no events.jsonl is given to follow; set events, or use at_s")
        port = FIRST_PORT + self._commands
        self._commands += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        self._agent.ask("clear")
        own = {**os.environ, **(environment or {})}
        self._running = Running(
            self,
            self._agent,
            list(members(self.config, own, per_host=per_host, port=port)),
            list(command),
            faults=chosen,
            events=events or self.config.events,
        )
        return self._running

    @property
    def running(self) -> Running:
        """The command that was started last. Raises LabError if none was."""
        if self._running is None:
            raise LabError("no command was started on the lab")
        return self._running

    def wait(self, *, timeout_s: float | None = None, keep_going: bool = False) -> LabOutcome:
        """Until every process of the command has ended; faults that are due meanwhile are injected.

        If one fails of itself, the others are stopped, unless `keep_going`. Raises LabError after `timeout_s`, with
        everything stopped.
        """
        return self.running.wait(timeout_s=timeout_s, keep_going=keep_going)

    def run(self, command: Sequence[str], *, timeout_s: float | None = None, per_host: bool = False) -> LabOutcome:
        """`start` and `wait`."""
        self.start(command, per_host=per_host)
        return self.wait(timeout_s=timeout_s)

    def counters(self) -> Counters:
        """Bytes and packets over every link since the lab was built, by the kernel."""
        answer = self._agent.ask("traffic")
        hosts = tuple(Traffic(**interfaces[network.INTERFACE]) for interfaces in answer["hosts"])
        switches = answer["switches"]
        return Counters(hosts, tuple(Traffic(**switches[network.uplink(site)]) for site in range(self.config.sites)))

    def set_rate(self, host: int, bytes_per_s: float | None) -> None:
        """Change the rate of a host's uplink, both ways; None: unlimited. Raises ValueError outside what is shaped."""
        self._run(network.host_rate(self._checked(host), self._rate(bytes_per_s), self.config.burst))

    def set_site_rate(self, site: int, bytes_per_s: float | None) -> None:
        """Change the rate of a site's uplink, both ways; None: unlimited. Raises ValueError outside what is shaped."""
        self._run(network.site_rate(self._checked_site(site), self._rate(bytes_per_s), self.config.burst))

    def cut(self, host: int) -> None:
        """Pull a host's cable: nothing gets through, and nobody is told."""
        self._run([network.plug_host(self._checked(host), up=False)])

    def restore(self, host: int) -> None:
        """Put a host's cable back."""
        self._run([network.plug_host(self._checked(host), up=True)])

    def cut_site(self, site: int) -> None:
        """Pull the cable of a site's uplink."""
        self._run([network.plug_site(self._checked_site(site), up=False)])

    def restore_site(self, site: int) -> None:
        """Put the cable of a site's uplink back."""
        self._run([network.plug_site(self._checked_site(site), up=True)])

    def drop_host(self, host: int) -> None:
        """A host loses power: its cable is dead and its processes are gone."""
        self.cut(host)
        self._agent.ask("signal", number=int(signal.SIGKILL), host=host)
        self._blame(lambda member_host, rank: member_host == host)

    def freeze(self, rank: int) -> None:
        """Stop a rank's processes (SIGSTOP). Raises LabError if it has none."""
        self._signal_rank(rank, signal.SIGSTOP)

    def thaw(self, rank: int) -> None:
        """Let a frozen rank go on. Raises LabError if it has no process."""
        self._signal_rank(rank, signal.SIGCONT)

    def kill(self, rank: int) -> None:
        """Kill a rank's processes (SIGKILL). Raises LabError if it has none."""
        self._signal_rank(rank, signal.SIGKILL)
        self._blame(lambda host, member_rank: member_rank in (rank, None) and host == self.config.host_of(rank))

    def inject(self, fault: Fault) -> None:
        """Do now what a fault says; its time is not looked at."""
        target = fault.host if fault.host is not None else fault.site if fault.site is not None else fault.rank
        assert target is not None
        if fault.kind == "rate":
            (self.set_rate if fault.site is None else self.set_site_rate)(target, fault.rate)
        elif fault.kind == "cut":
            (self.cut if fault.site is None else self.cut_site)(target)
        elif fault.kind == "restore":
            (self.restore if fault.site is None else self.restore_site)(target)
        else:
            {"drop_host": self.drop_host, "freeze": self.freeze, "thaw": self.thaw, "kill": self.kill}[fault.kind](
                target
            )

    def say(self, line: str) -> None:
        """Tell whoever listens."""
        self._say(line)

    @property
    def _agent(self) -> Inside:
        if self._inside is None:
            raise LabError("the lab is not built; use it as `with Lab(config) as lab:`")
        return self._inside

    def _build(self) -> None:
        names = [network.host_name(host) for host in range(self.config.hosts)]
        paths = self._agent.ask("make_hosts", names=names, hosts_file=network.hosts_file(self.config))
        try:
            self._run(network.build(self.config, {int(host): path for host, path in paths.items()}, self._congestion))
        except LabError as error:
            sentence = why_command_failed(str(error))
            if "no netem" in sentence:
                raise ConfigError(f"delay: {sentence}; leave delay out") from None
            raise LabError(sentence) from None

    def _run(self, commands: Iterable[Command]) -> None:
        self._agent.ask("run", commands=[(command.host, command.argv) for command in commands])

    def _signal_rank(self, rank: int, number: signal.Signals) -> None:
        if not 0 <= rank < self.config.ranks:
            raise ValueError(f"there is no rank {rank}; the lab has {self.config.ranks}, numbered from 0")
        if not self._agent.ask("signal", number=int(number), host=self.config.host_of(rank), rank=rank):
            raise LabError(f"no process on host {self.config.host_of(rank)} has RANK={rank} in its environment")

    def _blame(self, is_meant: Callable[[int, int | None], bool]) -> None:
        if self._running is not None:
            self._running.blame_fault(is_meant)

    def _checked(self, host: int) -> int:
        if not 0 <= host < self.config.hosts:
            raise ValueError(f"there is no host {host}; the lab has {self.config.hosts}, numbered from 0")
        return host

    def _checked_site(self, site: int) -> int:
        if not 0 <= site < self.config.sites:
            raise ValueError(f"there is no site {site}; the lab has {self.config.sites}, numbered from 0")
        return site

    @staticmethod
    def _rate(bytes_per_s: float | None) -> float | None:
        return None if bytes_per_s is None else checked_rate(bytes_per_s)
