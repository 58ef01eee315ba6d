"""Lets tests import their helpers by name; no test has a deadline; without a GPU, Triton's kernels are interpreted.

With several workers (`pytest -n`) the tests of a file share one, and so do all that build labs: they look for what labs
leave behind on this machine.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, whoever does that first

os.environ.setdefault(
    "TORCH_CPP_LOG_LEVEL", "ERROR"
)  # as in ranks; the server from which they are forked loads torch first

settings.register_profile("untimed", deadline=None)  # timings never decide a test
settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        builds_labs = hasattr(getattr(item, "module", None), "need_lab")
        item.add_marker(pytest.mark.xdist_group("labs" if builds_labs else item.nodeid.partition("::")[0]))
