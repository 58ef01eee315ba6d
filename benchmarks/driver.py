"""Runs one side of a comparison as a command on the lab, sets the links when its ranks ask, and says why it failed."""

import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinwire.errors import LabError
from thinwire.lab.lab import Lab

Result = dict[str, Any]
_RANK = re.compile(r"^\[rank\d+\]: ?")
"""What torch puts before a line of a traceback."""


def drive(
    lab: Lab, program: str, job: Mapping[str, Any], rates: Sequence[float | None], *, timeout_s: float
) -> tuple[list[Result], str | None]:
    """(one result per phase that was finished, what went wrong if something did).

    Every rank runs `program` with the file of `job`, which is given a folder. When `ready-N` appears there, the links
    get the N-th rate in Mbit/s (None: unlimited) and `go-N` is the answer; `result-N.json` is the phase's result.
    """
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base)
        file = folder / "job.json"
        file.write_text(json.dumps({**job, "folder": base, "rates": list(rates)}), encoding="utf-8")
        pending = dict(enumerate(rates))

        def answer() -> None:
            for phase in [phase for phase in pending if (folder / f"ready-{phase}").exists()]:
                set_rates(lab, pending.pop(phase))
                (folder / f"go-{phase}").touch()

        set_rates(lab, None)
        running = lab.start([sys.executable, program, str(file)])
        error = None
        try:
            outcome = running.wait(timeout_s=timeout_s, each_look=answer)
            if not outcome.ok:
                error = cause(sorted(lab.folder.glob("rank-*.log")))
        except LabError as late:
            error = str(late)
        written = [folder / f"result-{phase}.json" for phase in range(len(rates))]
        return [json.loads(path.read_text(encoding="utf-8")) for path in written if path.exists()], error


def set_rates(lab: Lab, mbit_per_s: float | None) -> None:
    """Every host's uplink, both ways."""
    for host in range(lab.config.hosts):
        lab.set_rate(host, None if mbit_per_s is None else mbit_per_s * 1e6 / 8)


def cause(logs: Sequence[Path]) -> str:
    """The last line of the ranks' logs that names an exception of its own, else the last line there is."""
    read = [line for log in logs for line in log.read_text(errors="replace").splitlines() if line.strip()]
    lines = [_RANK.sub("", line) for line in read]
    named = [line for line in lines if _names_an_exception(line)]
    own = [line for line in named if "Connection closed by peer" not in line and "DistNetworkError" not in line]
    return (own or named or lines or ["it said nothing"])[-1].strip()[:300]


def _names_an_exception(line: str) -> bool:
    """`ValueError: ...`, with or without the module's name, or gloo's own."""
    head = line.split(":", 1)[0]
    return (" " not in head and head.endswith(("Error", "Exception"))) or "EnforceNotMet" in line
