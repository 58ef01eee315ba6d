"""Starts of the command line that fork a server which has everything imported: a start anew imports torch in every process.

Such a start is a process like any other: its own arguments, environment, folder, output and signals; what it starts as
`python -m MODULE` is forked from it and runs that module as `__main__`. Nobody lives twice: every start is a new fork.
"""

import contextlib
import importlib
import multiprocessing as mp
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

_PRELOADED = [
    "torch.distributed", "thinwire.checkpoint.store", "thinwire.train.worker", "thinwire.train.assemble",
    "thinwire.train.loop", "thinwire.cli.train", "thinwire.cli.report", "thinwire.cli.probe",
]  # fmt: skip
"""Installed modules only: the server does not see the tests' folder.

What ranks import inside functions is named too: `assemble` brings torch's compiler, 2 s of processor time in every rank.
"""


def server() -> ForkServerContext:
    """From which processes are forked: one for all tests of a worker."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


class Started:
    """The command line in a process of its own, with the methods of subprocess.Popen that tests need."""

    def __init__(self, arguments: Sequence[str], *, env: Mapping[str, str], cwd: Path, merged: bool) -> None:
        """`merged`: whether errors go where output goes."""
        self.args = arguments
        self._out = _memory(self)
        self._err = None if merged else _memory(self)
        files = [Passed(self._out), Passed(self._out if self._err is None else self._err)]
        self._process = server().Process(target=_call, args=(list(arguments), dict(env), str(cwd), *files), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As poll found it last, or as it is now."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0, self._said(self._out))
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All output and errors up to the end of the process."""
        self.wait(timeout)
        return self._said(self._out), "" if self._err is None else self._said(self._err)

    def said(self) -> str:
        """Its output so far, and its errors where they go there."""
        return self._said(self._out)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    @staticmethod
    def _said(file: int) -> str:
        text = os.pread(file, os.fstat(file).st_size, 0).decode()  # the offset is that of the process, which may write
        return text.replace("\r\n", "\n").replace("\r", "\n")


def _memory(owner: object) -> int:
    """A file in memory, open as long as its owner lives."""
    file = os.memfd_create("output")
    weakref.finalize(owner, os.close, file)
    return file


class Passed:
    """A descriptor that is passed to the process in whose arguments it is."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return _detached, (DupFd(self.descriptor),)


def _detached(passed: Any) -> int:
    return int(passed.detach())


def _call(arguments: list[str], env: dict[str, str], cwd: str, out: int, err: int) -> None:
    """Be a start of the command line."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # found anew, from this environment
    os.dup2(out, 1)
    os.dup2(err, 2)
    for descriptor in {out, err}:
        os.close(descriptor)
    mp.current_process().daemon = False  # it may start others
    sys.argv = ["-c", *arguments]
    launch = importlib.import_module("thinwire.train.launch")
    vars(launch)["subprocess"] = SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL)
    importlib.import_module("thinwire.cli").main()


class Forked:
    """`python -m MODULE ARGUMENTS` as a fork of this process, where a launcher calls subprocess.Popen."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], stdin: int, stdout: Any, stderr: Any,
        pass_fds: Sequence[int], start_new_session: bool,
    ) -> None:  # fmt: skip
        assert command[:2] == [sys.executable, "-m"] and stdin == subprocess.DEVNULL and start_new_session
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _run_as(command, env, [file and file.fileno() for file in (stdout, stderr)], pass_fds)

    def poll(self) -> int | None:
        return self._ask(os.WNOHANG)

    def wait(self) -> int:
        code = self._ask(0)
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _ask(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _run_as(
    command: Sequence[str], env: Mapping[str, str], output: Sequence[int | None], kept: Sequence[int]
) -> NoReturn:
    """Be what `command` starts, as if it had been started anew, to the end of the process."""
    code = 1
    try:
        _forget_the_parent(env, output, kept)
        code = _main(command)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _forget_the_parent(env: Mapping[str, str], output: Sequence[int | None], kept: Sequence[int]) -> None:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, instead in enumerate([nothing, *output]):
        if instead is not None:
            os.dup2(instead, descriptor)
    for descriptor in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if descriptor > 2 and descriptor not in kept:
            with contextlib.suppress(OSError):  # that of the listing
                os.close(descriptor)


def _main(command: Sequence[str]) -> int:
    _, _, module, *arguments = command
    if '"rank": ' in arguments[0]:
        Path("/proc/self/comm").write_text(rank_name(arguments[0]))
    sys.orig_argv, sys.argv = list(command), [module, *arguments]
    del sys.modules[module]  # imported by the server, and not as __main__
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    return 0


def rank_name(place: str) -> str:
    """The name of a rank's process, as the system shows it, from the first argument of a rank."""
    return "rank " + place.partition('"rank": ')[2].partition(",")[0]
