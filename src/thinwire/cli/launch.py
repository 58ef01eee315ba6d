"""`thinwire launch`: a run on a cluster with a scheduler."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from thinwire.cli import SET
from thinwire.errors import ConfigError
from thinwire.operate.allocation import Allocation, allocate, job_name, memory, one_line, variables, volume_claim
from thinwire.operate.kubernetes import KubernetesRequest, check_paths, gpu_resource_of, manifest, off_claim
from thinwire.operate.slurm import TASK, SlurmRequest, check_array, first_task, run_folders, script
from thinwire.operate.slurm import submit as to_sbatch
from thinwire.train.config import RunConfig
from thinwire.train.job import Outline, default_folder, foreseen, outlined, read_config
from thinwire.units import parse_seconds

app = typer.Typer(help="Start a run under a scheduler.", no_args_is_help=True, rich_markup_mode=None)

RUN = typer.Argument(metavar="RUN.toml", help="The run file.")
NODES = typer.Option(help="Nodes, or a range such as 2-4: the run's levels become [ranks per node, nodes].")
PER_NODE = typer.Option(help="Default: the ranks inside the run's level called node.", min=1)
INTERFACE = typer.Option(
    help="Network interface for the ranks to talk over, such as ib0; default: the one that reaches the others."
)
PER = typer.Option(help="rank: one task per rank. node: one task per node, which starts its ranks.")
ARRAY = typer.Option(help="Array tasks, such as 0-7%2; {task} in --set is the number.")
SETUP = typer.Option(help="A line of shell to run first, such as 'module load cuda'; may be repeated, in order.")
PYTHON = typer.Option(help="The interpreter that runs the ranks; after --setup often just python.")
ENV = typer.Option("--env", metavar="NAME=VALUE", help="A variable for every rank; may be repeated.")


@app.command()
def slurm(
    run_file: Annotated[Path, RUN],
    settings: Annotated[list[str] | None, SET] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Hand the script to sbatch instead of printing it.")] = False,
    nodes: Annotated[str | None, NODES] = None,
    ranks_per_node: Annotated[int | None, PER_NODE] = None,
    per: Annotated[str, PER] = "rank",
    cpus_per_rank: Annotated[int | None, typer.Option(help="Default: 1, on accelerators 4.", min=1)] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, as sbatch takes it; default: the partition's.")] = None,
    stop_before: Annotated[str, typer.Option(help="How long before the limit the run stops and saves.")] = "120 s",
    requeues: Annotated[int, typer.Option(help="Most times the job asks for itself again.", min=0)] = 100,
    array: Annotated[str | None, ARRAY] = None,
    mem: Annotated[str | None, typer.Option(help="Memory of a node, such as 64G; default: the cluster's.")] = None,
    setup: Annotated[list[str] | None, SETUP] = None,
    env: Annotated[list[str] | None, ENV] = None,
    python: Annotated[str, PYTHON] = sys.executable,
    interface: Annotated[str | None, INTERFACE] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="A further sbatch option, such as partition=gpu.")] = None,
) -> None:
    """Print, or submit, an sbatch script that saves before the time limit and goes on after it, preemption or a fault.

    Example: thinwire launch slurm run.toml --time 4:00:00 --sbatch partition=gpu --sbatch account=lab
    """
    if per not in ("rank", "node"):
        raise ConfigError(f"--per {per} is unknown; there are rank and node")
    lead_s = _seconds("--stop-before", stop_before)
    allocation, job = _checked(run_file, settings or [], nodes, ranks_per_node, array)
    gpus = job.cluster.device.kind == "cuda"
    run, logs = run_folders(job.folder, array, settings or [])
    request = SlurmRequest(
        name=run_file.stem,
        run_file=run_file.absolute(),
        settings=tuple(settings or ()),
        run=run,
        logs=logs,
        allocation=allocation,
        gpus=gpus,
        python=one_line("--python", python),
        directory=Path.cwd(),
        per="node" if per == "node" else "rank",
        cpus_per_rank=cpus_per_rank or (4 if gpus else 1),
        time=time,
        stop_before_s=round(lead_s),
        requeues=requeues,
        array=array,
        mem=None if mem is None else memory(mem),
        setup=tuple(setup or ()),
        variables=variables(env or ()),
        interface=None if interface is None else one_line("--interface", interface),
        more=tuple(option.removeprefix("--") for option in sbatch or ()),
    )
    text = script(request)
    _tell_unnamed(job.config, gpus=gpus)
    _hand_over(text, logs, submit=submit)


def _hand_over(script: str, logs: Path, *, submit: bool) -> None:
    """Submit the script, or print it."""
    if submit:
        typer.echo(f"submitted job {to_sbatch(script, logs)}; its output goes to {logs}")
        return
    typer.echo(script, nl=False)
    typer.echo(f"thinwire: before sbatch: mkdir -p {shlex.quote(str(logs))}", err=True)


@app.command()
def k8s(
    run_file: Annotated[Path, RUN],
    image: Annotated[str, typer.Option(help="Container image with thinwire in it.")],
    settings: Annotated[list[str] | None, SET] = None,
    nodes: Annotated[str | None, NODES] = None,
    ranks_per_node: Annotated[int | None, PER_NODE] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job; default: the run file's.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Kubernetes namespace.")] = None,
    claim: Annotated[str | None, typer.Option(help="A volume claim and its place in the pod: NAME:/PATH.")] = None,
    gpu_resource: Annotated[
        str | None, typer.Option(help="What the cluster calls its accelerators; default: as NVIDIA or AMD do.")
    ] = None,
    env: Annotated[list[str] | None, ENV] = None,
    kind: Annotated[
        str, typer.Option(help="pytorchjob: Kubeflow's training operator (v1). trainjob: its trainer (v2).")
    ] = "pytorchjob",
    interface: Annotated[str | None, INTERFACE] = None,
) -> None:
    """Print a Kubeflow job, and the ConfigMap with its run file; pipe it to `kubectl apply -f -`.

    Example: thinwire launch k8s run.toml --image registry/thinwire:0.1 --claim corpora:/data
    """
    import yaml

    if kind not in ("pytorchjob", "trainjob"):
        raise ConfigError(f"--kind {kind} is unknown; there are pytorchjob and trainjob")
    allocation, config = _for_pods(run_file, settings or [], nodes, ranks_per_node, kind)
    folder, device = config.run.folder or default_folder(run_file), config.cluster.resolve(run_file.parent).device
    check_paths(run_file, config, folder)
    mounted = None if claim is None else volume_claim(claim)
    request = KubernetesRequest(
        name=job_name(name or run_file.stem),
        image=one_line("--image", image),
        run_file=run_file.read_text(encoding="utf-8"),
        settings=tuple(settings or ()),
        allocation=allocation,
        gpu_resource=(gpu_resource or gpu_resource_of(device.name)) if device.kind == "cuda" else None,
        namespace=None if namespace is None else one_line("--namespace", namespace),
        claim=mounted,
        interface=None if interface is None else one_line("--interface", interface),
        variables=variables(env or ()),
        kind="trainjob" if kind == "trainjob" else "pytorchjob",
    )
    _tell_unnamed(config, gpus=device.kind == "cuda")
    if warning := off_claim(folder, mounted):
        typer.echo(f"thinwire: {warning}", err=True)
    typer.echo(yaml.safe_dump_all(manifest(request), sort_keys=False), nl=False)


def _for_pods(
    run_file: Path, settings: list[str], nodes: str | None, ranks_per_node: int | None, kind: str
) -> tuple[Allocation, RunConfig]:
    """What to ask for, and the run file. Raises ConfigError; what lies on the claim cannot be looked at from here."""
    allocation = allocate(run_file, settings, nodes=nodes, ranks_per_node=ranks_per_node)
    if allocation.fewest != allocation.most:
        job = "TrainJob" if kind == "trainjob" else "PyTorchJob"
        raise ConfigError(f"--nodes {nodes}: a {job} has a fixed number of pods; give one number")
    levels = [allocation.levels(str(allocation.fewest))] if allocation.from_nodes else []
    config = read_config(run_file, [*settings, *levels])
    if config.plan.file is None:
        outlined(run_file, config)
    return allocation, config


def _tell_unnamed(config: RunConfig, *, gpus: bool) -> None:
    """What a scheduler's machines have cannot be seen from here: say what the script does if the run file does not."""
    where = config.cluster
    if where.device is None and where.preset is None and where.file is None:
        found = "it asks for GPUs because this machine has some" if gpus else "it asks for no GPU: the run is on CPUs"
        typer.echo(
            f"thinwire: the run file names no cluster.device, so {found}; `thinwire presets` lists names", err=True
        )


def _checked(
    run_file: Path, settings: list[str], nodes: str | None, ranks_per_node: int | None, array: str | None
) -> tuple[Allocation, Outline]:
    """What to ask for, and the run on the fewest nodes. Every number of nodes is tried, so that none fails in the queue."""
    check_array(settings, array)
    plain = [setting.replace(TASK, first_task(array or "")) for setting in settings]
    allocation = allocate(run_file, plain, nodes=nodes, ranks_per_node=ranks_per_node)
    runs = []
    for count in range(allocation.fewest, allocation.most + 1):
        levels = [allocation.levels(str(count))] if allocation.from_nodes else []
        runs.append(foreseen(run_file, read_config(run_file, [*plain, *levels])))
    return allocation, runs[0]


def _seconds(option: str, text: str) -> float:
    """What an option's duration is in seconds. Raises ConfigError."""
    try:
        return parse_seconds(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
