"""Lets tests import their helpers by name; no test has a deadline; without a GPU, Triton's kernels are interpreted."""

import os
import sys
from pathlib import Path

import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, whoever does that first

settings.register_profile("untimed", deadline=None)  # timings never decide a test
settings.load_profile("untimed")
