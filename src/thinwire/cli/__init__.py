"""The command line: one file per verb, imported only when that verb is called, so that `--help` answers at once.

Exit status: 0 done, 1 the run failed, 2 the input was wrong. An error is one sentence on standard error.
"""

import importlib
import keyword
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from thinwire.errors import ThinwireError

_VERBS = {
    "train": "Train what a run file describes; resumes a run that was stopped or killed.",
    "plan": "Find the fastest plan for a model on a cluster, and explain it.",
    "simulate": "Play one step of a plan through: timeline, trace file, slow ranks, failures.",
    "probe": "Measure this cluster: matmuls, memory, every level's links; writes a cluster file for planning.",
    "report": "One page about runs: loss, step time, bytes and memory, predicted beside measured.",
    "data": "Prepare token files from text, and look at them.",
    "eval": "Loss, perplexity and bits per byte of a run on held-out text.",
    "lab": "An emulated cluster with slow links on this machine; commands, training runs and faults on it.",
    "generate": "Continue a prompt with a run's model.",
    "export": "Write a run's model as a Hugging Face folder.",
    "launch": "Start a run under Slurm or Kubernetes.",
    "presets": "List the devices, clusters and models that run files name.",
    "import": "Make the folder that a run starts from out of a Hugging Face folder.",
}


class LazyGroup(TyperGroup):
    """A group whose verbs live in `thinwire.cli.VERB` (`import_` for the keyword): a typer `app`, or a function `run`."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _VERBS:
            return None
        module = importlib.import_module(f"thinwire.cli.{cmd_name}{'_' if keyword.iskeyword(cmd_name) else ''}")
        verb = getattr(module, "app", None)
        if verb is None:
            verb = typer.Typer(rich_markup_mode=None)
            verb.command(name=cmd_name)(module.run)
        command = typer.main.get_command(verb)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_VERBS.items()))


app = typer.Typer(
    cls=LazyGroup,
    help="Train language models where the network, not the chips, is the bottleneck.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from thinwire import __version__

        typer.echo(f"thinwire {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Options of the program itself."""


def main(arguments: list[str] | None = None) -> Any:
    """The console script."""
    try:
        return app(arguments, prog_name="thinwire")
    except ThinwireError as error:
        typer.echo(f"thinwire: {error}", err=True)
        sys.exit(error.exit_status)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        if error.filename is None:
            raise
        typer.echo(
            f"thinwire: {error.filename} cannot be used: {error.strerror}; make it readable, or give another", err=True
        )
        sys.exit(2)
