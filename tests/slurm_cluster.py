"""A real Slurm on this machine: munge, one controller, several node daemons, all in one temporary folder.

Installs Debian's slurm-wlm and munge if they are missing, which needs root. Two partitions: `low`, whose jobs are requeued
when one of `high` needs the nodes, after a grace time.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PROGRAMS = {
    "munged": "munge",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "srun": "slurm-wlm",
}

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait=5
MpiDefault=none
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=40 MaxTime=30 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=30 State=UP
"""


def install() -> None:
    """Make sure that Slurm and munge are there. Raises RuntimeError saying what is missing."""
    missing = sorted({package for program, package in _PROGRAMS.items() if _which(program) is None})
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise RuntimeError(f"these tests need {', '.join(missing)}, and root on Debian or Ubuntu to install them")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
        subprocess.run(["apt-get", "-qq", *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Slurm:
    """A running cluster. `environment` makes Slurm's commands talk to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *command: str) -> str:
        """Output of one of Slurm's commands."""
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        said = self.call("scontrol", "--oneliner", "show", "job", number)
        return dict(word.partition("=")[::2] for word in said.splitlines()[0].split() if "=" in word)

    def wait(self, number: str, *states: str, timeout_s: float = 180) -> dict[str, str]:
        """The job once it is in one of `states`."""
        end_s = time.monotonic() + timeout_s
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < end_s, f"job {number} is {job['JobState']} ({job.get('Reason')}), not {states}"
            time.sleep(0.3)
        return job


@contextmanager
def slurm(folder: Path, *, nodes: int = 3, cpus: int = 4) -> Iterator[Slurm]:
    """A cluster of `nodes` nodes n1, n2, ... that all are this machine; gone when the context ends."""
    install()
    cluster, started = Slurm(folder), []
    try:
        _configure(folder, nodes, cpus)
        started.append(_start(_munge(folder), folder / "munged.out", cluster.environment))
        _until((folder / "munge.socket").exists, "munged did not open its socket")
        slurmctld, slurmd = _which("slurmctld"), _which("slurmd")
        assert slurmctld is not None and slurmd is not None
        started.append(_start([slurmctld, "-D"], folder / "slurmctld.out", cluster.environment))
        started += [
            _start([slurmd, "-D", "-N", f"n{number}"], folder / f"n{number}.out", cluster.environment)
            for number in range(1, nodes + 1)
        ]
        _until(lambda: _idle(cluster) == nodes, f"the nodes did not come up; see {folder}/*.log")
        yield cluster
        _cancel_all(cluster)
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _configure(folder: Path, nodes: int, cpus: int) -> None:
    host = socket.gethostname().partition(".")[0]
    ports = _free_ports(nodes + 1)
    lines = [
        f"NodeName=n{i + 1} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=1000 State=UNKNOWN"
        for i, port in enumerate(ports[1:])
    ]
    conf = _CONF.format(host=host, folder=folder, controller_port=ports[0], nodes="\n".join(lines))
    (folder / "slurm.conf").write_text(conf)
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    (folder / "state").mkdir()
    folder.chmod(0o755)
    for parent in folder.parents:  # munge asks that nobody but the owner can change what leads to its socket
        if parent.stat().st_mode & 0o022 == 0 and parent.stat().st_uid == os.geteuid():
            parent.chmod(parent.stat().st_mode | 0o055)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)


def _munge(folder: Path) -> list[str]:
    munged = _which("munged")
    assert munged is not None
    files = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munged.seed",
             "key-file": "munge.key"}  # fmt: skip
    return [munged, "--foreground", "--force", *(f"--{name}={folder / file}" for name, file in files.items())]


def _start(command: list[str], output: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


def _idle(cluster: Slurm) -> int:
    done = subprocess.run(["sinfo", "--noheader", "--Node", "--partition=low", "--format=%T"], capture_output=True,
                          text=True, env=cluster.environment, check=False)  # fmt: skip
    return done.stdout.split().count("idle")


def _cancel_all(cluster: Slurm) -> None:
    subprocess.run(["scancel", "--user=root"], env=cluster.environment, check=False)


def _until(ready: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    end_s = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > end_s:
            raise RuntimeError(what)
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
