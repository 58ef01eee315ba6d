"""The numbers of the progress line: what utilisation is measured against."""

import pytest
import torch

from thinwire.cluster.cluster import Device
from thinwire.model.presets import preset
from thinwire.train.progress import mfu, peak_flops_per_s


def test_a_peak_that_is_given_is_taken() -> None:
    given = Device(name="a chip", kind="cuda", peak_flops_per_s=989e12, origin="given")
    assert peak_flops_per_s(given, torch.bfloat16) == (989e12, "given")


def test_a_cpus_peak_is_measured() -> None:
    peak, origin = peak_flops_per_s(Device(), torch.float32)
    assert origin == "measured"
    assert 1e8 < peak < 1e14


def test_utilisation_is_the_models_flops_over_all_ranks_peaks() -> None:
    spec = preset("llama-1m")
    flops = spec.model_flops_per_token(64)
    assert mfu(spec, tokens_per_sequence=64, tokens_per_s=300.0, ranks=3, peak=1000 * flops) == pytest.approx(0.1)
