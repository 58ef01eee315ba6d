"""Lets tests import their helpers by name; no test has a deadline; without a GPU, Triton's kernels are interpreted.

With several workers (`pytest -n`) the tests of a file share one, and so do all that build labs: they look for what labs
leave behind on this machine.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, whoever does that first

# As in ranks; the server from which they are forked loads torch first.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

settings.register_profile("untimed", deadline=None)  # timings never decide a test
settings.load_profile("untimed")


class ByFile(LoadScopeScheduling):
    """Deals out whole files: their fixtures are made once. Everything that builds labs is one piece."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "labs" if "need_lab" in (Path(__file__).parents[1] / file).read_text() else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)
