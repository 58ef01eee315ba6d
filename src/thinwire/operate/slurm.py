"""An sbatch script for a run, by the Slurm manual. A pure function of what was asked for. No torch.

The batch shell is warned (`--signal=B:USR1`) when time is nearly up and passes it on through srun: the ranks finish their
step and save. It then asks for the same job again, unless the run is finished, was cancelled, or has been requeued too
often. At a preemption Slurm's SIGTERM has the same effect. Tasks are laid out block by block, so that neighbouring ranks
share a node, as the levels count them.

A script is tried first (`sbatch --test-only`), so that a refusal leaves nothing behind.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from thinwire.errors import ConfigError
from thinwire.operate.allocation import Allocation, one_line

TASK = "{task}"
"""In a setting: the array task's number."""
_IN_SHELL = {TASK: '"$SLURM_ARRAY_TASK_ID"', "{nodes}": '"$SLURM_JOB_NUM_NODES"'}


@dataclass(frozen=True)
class SlurmRequest:
    """Everything that an sbatch script says."""

    name: str
    run_file: Path
    settings: tuple[str, ...]
    run: str
    """The run folder, absolute; `{task}` in it is an array task's number."""
    logs: Path
    """Where the job's output goes; it must exist before the job starts."""
    allocation: Allocation
    gpus: bool
    python: str
    directory: Path
    """Where the job runs."""
    per: Literal["rank", "node"] = "rank"
    """One task per rank, or one launcher per node."""
    cpus_per_rank: int = 1
    time: str | None = None
    stop_before_s: int = 120
    requeues: int = 100
    array: str | None = None
    mem: str | None = None
    """Memory of a node, as sbatch takes it."""
    setup: tuple[str, ...] = ()
    """Lines of shell that come first: modules, environments."""
    variables: Mapping[str, str] = field(default_factory=dict)
    interface: str | None = None
    more: tuple[str, ...] = ()
    """Further options of sbatch, without the leading dashes."""


def script(request: SlurmRequest) -> str:
    """The whole text of the sbatch script. Raises ConfigError if anything in its header has a line break."""
    parts = [_header(request), _setup(request), _environment(request), _body(request)]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _header(request: SlurmRequest) -> list[str]:
    nodes, ranks = request.allocation, request.allocation.ranks_per_node
    count = str(nodes.fewest) if nodes.fewest == nodes.most else f"{nodes.fewest}-{nodes.most}"
    log = "slurm-%A_%a.out" if request.array else "slurm-%j.out"
    options: dict[str, object] = {
        "job-name": request.name,
        "nodes": count,
        "ntasks-per-node": ranks if request.per == "rank" else 1,
        "cpus-per-task": request.cpus_per_rank * (1 if request.per == "rank" else ranks),
        "gpus-per-node": ranks if request.gpus else None,
        "mem": request.mem,
        "time": request.time,
        "array": request.array,
        "signal": f"B:USR1@{request.stop_before_s}",
        "requeue": "",
        "open-mode": "append",
        "chdir": request.directory,
        "output": request.logs / log,
    }
    said = [_option(name, str(value)) for name, value in options.items() if value is not None]
    more = [one_line("--sbatch", option) for option in request.more]
    return ["#!/bin/bash", *(f"#SBATCH --{option}" for option in [*said, *more])]


def _option(name: str, value: str) -> str:
    """Of the header, where sbatch undoes quotes as a shell does."""
    return f"{name}={shlex.quote(one_line(name, value))}" if value else name


def _setup(request: SlurmRequest) -> list[str]:
    """Lines that the user wants first, before this script's own rules apply: activation scripts read unset variables."""
    lines = []
    for line in request.setup:
        failed = shlex.quote(f"thinwire: this line of --setup failed: {one_line('--setup', line)}")
        lines += [line, f'[ "$?" -eq 0 ] || {{ echo {failed} >&2; exit 1; }}']
    return lines


def _environment(request: SlurmRequest) -> list[str]:
    lines = [
        "set -u",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "# its address as Slurm knows it: the ranks meet there",
        "address=$(scontrol --oneliner show node \"$first\" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')",
        "export MASTER_ADDR=${address:-$first}",
        "export OMP_NUM_THREADS=" + str(request.cpus_per_rank),
        "export PYTHONUNBUFFERED=1",
    ]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in request.variables.items()]
    if request.interface:
        names = ["GLOO_SOCKET_IFNAME", *(["NCCL_SOCKET_IFNAME"] if request.gpus else [])]
        lines += [f"export {name}={shlex.quote(request.interface)}" for name in names]
    return lines


def _body(request: SlurmRequest) -> list[str]:
    job = '"${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"' if request.array else '"$SLURM_JOB_ID"'
    return [
        f"run={_quoted(request.run)}",
        f"job={job}",
        'finished() { tail -n 1 "$run/events.jsonl" 2>/dev/null | grep -q \'"event":"run_end".*"reason":"finished"\'; }',
        'cancelled() { [ "$(squeue --noheader --jobs="$job" --format=%T)" != RUNNING ]; }',
        "",
        " ".join(_srun(request)) + " &",
        "ranks=$!",
        "trap 'kill -USR1 $ranks 2>/dev/null' USR1  # time is nearly up",
        "trap 'kill -TERM $ranks 2>/dev/null' TERM  # preempted or cancelled",
        "while true; do  # a trap ends a wait early; the ranks are saving then",
        '  wait "$ranks"',
        '  kill -0 "$ranks" 2>/dev/null || break',
        "done",
        'wait "$ranks"; status=$?  # theirs, also where they ended right behind a trap',
        '[ "$status" -ne 138 ] || status=0  # USR1 came before they listened to it: nothing was begun, and nothing is lost',
        "",
        'if [ "$status" -ne 0 ] || finished || cancelled; then exit "$status"; fi',
        f'if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {request.requeues} ]; then',
        f'  echo "thinwire: requeued {request.requeues} times and still not finished; submit again to go on" >&2; exit 1',
        "fi",
        'echo "thinwire: stopped before the end; asking for job $job again"',
        'scontrol requeue "$job"',
    ]


def _srun(request: SlurmRequest) -> list[str]:
    ranks = request.allocation.ranks_per_node
    words = ["srun", "--kill-on-bad-exit=1", "--distribution=block", '--cpus-per-task="$SLURM_CPUS_PER_TASK"']
    if request.gpus:
        words.append("--gpu-bind=none")
    settings = [*request.settings]
    if request.allocation.from_nodes:
        settings.append(request.allocation.levels("{nodes}"))
    if request.array:
        settings.append(f"run.folder={request.run}")
    words += [shlex.quote(request.python), "-m", "thinwire", "train", shlex.quote(str(request.run_file))]
    if request.per == "node":
        words.append(f"--ranks-per-node={ranks}")
    for setting in settings:
        words += ["--set", _quoted(setting)]
    return words


def _quoted(text: str) -> str:
    """`text` as one word of a shell, with what stands for a variable put in."""
    for mark, variable in _IN_SHELL.items():
        if mark in text:
            before, after = text.split(mark, 1)
            return "".join([_quoted(before) if before else "", variable, _quoted(after) if after else ""])
    return shlex.quote(text)


def first_task(array: str) -> str:
    """The first number of an array specification such as `0-7%2` or `3,5`."""
    found = re.match(r"[0-9]{1,9}", array)
    return found[0] if found else ""


def check_array(settings: Sequence[str], array: str | None) -> None:
    """Raise ConfigError if the settings and the array do not go together."""
    if array is None and any(TASK in setting for setting in settings):
        raise ConfigError(f"{TASK} in --set stands for an array task's number; give --array too")
    if array is not None and not first_task(array):
        raise ConfigError(f"--array {array} does not begin with a number; write for example 0-7%2")


def run_folders(folder: Path, array: str | None, settings: Sequence[str]) -> tuple[str, Path]:
    """(the run folder, with `{task}` if there is an array, the folder for the job's output), both absolute.

    `folder` is that of the run file with its settings. Raises ConfigError if the tasks of an array would share one.
    """
    if array is None:
        return str(folder.absolute()), folder.absolute() / "logs"
    chosen = [setting.partition("=")[2].strip(" \"'") for setting in settings if _key(setting) == "run.folder"]
    if not chosen:
        return str(folder.absolute() / TASK), folder.absolute() / "logs"
    if TASK not in chosen[-1]:
        raise ConfigError(f"the tasks of an array would share the run folder {chosen[-1]}; put {TASK} into run.folder")
    return str(Path(chosen[-1]).absolute()), Path(chosen[-1].partition(TASK)[0] + "x").absolute().parent / "logs"


def _key(setting: str) -> str:
    return setting.partition("=")[0].strip()


def submit(text: str, logs: Path) -> str:
    """Submit the script `text` after making the folder `logs`: the job's number.

    Raises ConfigError if there is no sbatch, or with what sbatch says if it refuses.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on this machine's PATH, so nothing was submitted; do it on a login node of the cluster, or leave "
            "--submit out to have the script printed"
        )
    _sbatch(text, "--test-only")
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{logs} cannot be made: {error.strerror}; choose another with --set run.folder=PATH"
        ) from None
    return _sbatch(text, "--parsable").strip().partition(";")[0]


def _sbatch(text: str, option: str) -> str:
    done = subprocess.run(["sbatch", option], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines())
        raise ConfigError(f"sbatch refuses the job: {said or 'it does not say why'}")
    return done.stdout
