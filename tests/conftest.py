"""Lets tests import their helpers by name; no test has a deadline; without a GPU, Triton's kernels are interpreted."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, whoever does that first

settings.register_profile("untimed", deadline=None)  # timings never decide a test
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share the tests, a file stays whole (its worlds are run once), and labs take turns."""
    for item in items:
        labs = "need_lab" in vars(getattr(item, "module", None) or object)
        item.add_marker(pytest.mark.xdist_group("labs" if labs else str(item.path)))
