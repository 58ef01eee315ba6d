"""The command line: one file per verb, imported only when that verb is called, so that `--help` answers at once.

Exit status: 0 done, 1 the run failed, 2 the input was wrong. An error is one sentence on standard error.
"""

import importlib
import keyword
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from thinwire import __version__
from thinwire.config import nearest
from thinwire.errors import ConfigError, ThinwireError
from thinwire.train.console import forgive, refused

SET = typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the run file; may be repeated.")
"""Of every verb that reads a run file."""
_ENDLESS = re.compile(r"\S{400,}")
_UsageError: type[Any] = typer.BadParameter.__mro__[1]
"""Of the copy of click that typer carries, which it does not export."""

_VERBS = {
    "train": "Train what a run file describes; resumes a run that was stopped or killed.",
    "plan": "Find the fastest plan for a model on a cluster, and explain it.",
    "simulate": "Simulate one step of a plan: timeline, trace file, slow ranks, failures.",
    "probe": "Measure this cluster: matmuls, memory, every level's links; writes a cluster file for planning.",
    "report": "One page about runs: loss, step time, bytes and memory, predicted beside measured.",
    "data": "Prepare token files from text, and look at them.",
    "eval": "Loss, perplexity and bits per byte of a run on its validation split.",
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
            raise ConfigError(f"there is no verb {cmd_name!r}{nearest(cmd_name, list(_VERBS))}")
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
        typer.echo(f"thinwire {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Options of the program itself."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """The console script: it leaves with the exit status of the verb."""
    forgive()
    warnings.showwarning = _show_warning
    try:
        status = app(arguments, prog_name="thinwire", standalone_mode=False)
    except ThinwireError as error:
        _leave(str(error), error.exit_status)
    except _UsageError as error:
        _leave(_of_usage(error), ConfigError.exit_status)
    except OSError as error:
        if error.filename is None:
            raise
        _leave(_of_system(error), ConfigError.exit_status)
    if isinstance(status, int) and status:
        sys.exit(status)
    if why := refused():
        _leave(f"standard output takes no more ({why.strerror}), so it is not whole; make room, or give another", 1)
    sys.exit(0)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """What a user is to change before the next release is a line like any other; the rest says where it comes from."""
    ours = issubclass(category, FutureWarning) and Path(filename).is_relative_to(Path(__file__).parents[1])
    typer.echo(
        f"thinwire: note: {message}" if ours else warnings.formatwarning(message, category, filename, lineno), err=True
    )


def _leave(sentence: str, status: int) -> NoReturn:
    typer.echo(f"thinwire: {_one_line(sentence)}", err=True)
    sys.exit(status)


def _one_line(sentence: str) -> str:
    """With what a user gave spelled out where it would break the line, and cut where it is endless."""
    shown = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in sentence)
    return _ENDLESS.sub(lambda word: f"{word[0][:100]}...{word[0][-60:]}", shown)


def _of_system(error: OSError) -> str:
    """What the system refuses about a path that the user gave."""
    return f"{error.filename} cannot be used: {error.strerror}; make it readable and writable, or give another"


def _of_usage(error: Any) -> str:
    """What is wrong with the words of the command line; help, where there are none."""
    if error.ctx is not None and type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(error.exit_code)
    path = error.ctx.command_path if error.ctx is not None else "thinwire"
    text = error.format_message().removeprefix("Invalid value for ").removeprefix("Invalid value: ").rstrip(".")
    text = text.partition(", unable to")[0].replace(": Input should", " must").replace(". Did you", "; did you")
    return f"{text[:1].lower()}{text[1:].removesuffix('?')}; `{path} --help` lists what there is"
