"""One rank of a training run under torch's allocation profiler: the most that its tensors ever took at once.

    torchrun --nproc-per-node 2 benchmarks/peak_rank.py OUT train RUN.toml [--set KEY=VALUE …]

`OUT/<rank>.json` gets the bytes, from the start of the process to the end of the last optimizer step: what is copied for
a checkpoint afterwards is host memory, which on a CPU cannot be told from the device's.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from thinwire.cli import main


def peak_bytes(trace: Path) -> int:
    """From a trace of torch's profiler with allocations. Raises ValueError if no optimizer stepped in it."""
    events = json.loads(trace.read_text())["traceEvents"]
    steps = [each["ts"] + each["dur"] for each in events if str(each.get("name")).startswith("Optimizer.step")]
    if not steps:
        raise ValueError(f"no optimizer step in {trace}")
    return max(each["args"]["Total Allocated"] for each in events if _allocates(each) and each["ts"] <= max(steps))


def _allocates(event: dict[str, object]) -> bool:
    return event.get("name") == "[memory]"


def run(out: Path) -> None:
    """Train with the command line that is left, and write the peak of this rank. Raises SystemExit if it fails."""
    torch.set_num_threads(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        try:
            main()
        except SystemExit as left:
            if left.code:
                raise
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        (out / f"{os.environ['RANK']}.json").write_text(json.dumps(peak_bytes(trace)))


if __name__ == "__main__":
    run(Path(sys.argv.pop(1)))
