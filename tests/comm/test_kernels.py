"""The fused kernels make the bits of plain torch: interpreted here, compiled where a GPU is; and what they compile to."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.comm.codecs import blocks
from thinwire.comm.codecs.blocks import BlockFormat
from thinwire.comm.codecs.codec import Blocks, arithmetic, make_codec
from thinwire.comm.codecs.rng import uniform

pytest.importorskip("triton", reason="Triton is not installed: pip install thinwire[gpu]")
from thinwire.comm.codecs import kernels

NAMES = ["int8", "int4", "int4-hadamard", "e3m0"]
ROUNDINGS = ["nearest", "stochastic"]
KINDS = ["ordinary", "any bits", "tiny", "halves", "holes", "broken"]


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    if request.param == "interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is a GPU here: the kernels are compiled for it, not interpreted")
    return torch.device("cuda" if request.param == "cuda" else "cpu")


def form_of(name: str, rounding: str, block: int = 128) -> BlockFormat:
    codec = make_codec(name, block=block, rounding=rounding)  # type: ignore[arg-type]
    assert isinstance(codec, Blocks)
    return codec.form


def numbers(kind: str, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * torch.exp(3 * torch.randn(n, generator=generator))
    if kind == "any bits":
        x = torch.randint(-(2**31), 2**31, (n,), generator=generator).int().view(torch.float32)
    elif kind == "tiny":
        x *= 1e-41
    elif kind == "halves":  # ties, and numbers at the edges of codes
        x = torch.randint(-128, 129, (n,), generator=generator) * 2.0 ** torch.randint(-8, 3, (n,), generator=generator)
    elif kind == "holes":
        x[torch.rand(n, generator=generator) < 0.7] = 0.0
        x[: n // 2] *= 0.0  # of both signs
    elif kind == "broken":
        x[torch.rand(n, generator=generator) < 0.005] = math.nan
        x[torch.rand(n, generator=generator) < 0.005] = -math.inf
    return x


def same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, but any NaN is a NaN."""
    a, b = a.cpu(), b.cpu()
    number = ~(a.isnan() & b.isnan())
    return torch.equal(a[number].view(torch.uint8), b[number].view(torch.uint8))


def check(x: Tensor, form: BlockFormat, seed: int, device: torch.device, out: torch.dtype = torch.float32) -> None:
    coded = blocks.encode(x, form, seed)
    with np.errstate(all="ignore"):
        assert torch.equal(kernels.encode(x.to(device), form, seed).cpu(), coded)
    rows = torch.stack([coded, blocks.encode(x.flip(0), form, seed + 1), blocks.encode(x * 0.3, form, seed + 2)])
    for received in (rows[:1], rows):
        expected, made = torch.empty(len(x), dtype=out), torch.empty(len(x), dtype=out, device=device)
        for add in (False, True):
            blocks.sum_into(received, expected, form, add=add)
            with np.errstate(all="ignore"):
                kernels.sum_into(received.to(device), made, form, add=add)
            assert same(made, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@given(data=st.data())
@settings(max_examples=15)
def test_kernels_make_the_bits_of_the_reference(
    device: torch.device, name: str, rounding: str, data: st.DataObject
) -> None:
    form = form_of(name, rounding, data.draw(st.sampled_from([64, 128, 256])))
    n, kind = data.draw(st.integers(1, 5000)), data.draw(st.sampled_from(KINDS))
    check(numbers(kind, n, data.draw(st.integers(0, 2**31))), form, data.draw(st.integers(0, 2**40)), device)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_agree_on_every_kind_of_number(device: torch.device, name: str, rounding: str, kind: str) -> None:
    check(numbers(kind, 2301, 1), form_of(name, rounding), 5, device)


@pytest.mark.parametrize("beside", [-1, 0, 1])
def test_powers_by_chance_are_right_where_noise_and_number_nearly_meet(device: torch.device, beside: int) -> None:
    """Numbers that lie at, just below and just above their own noise, which has one bit more than they can: of random
    numbers only one in ten million does."""
    form, n, seed = form_of("e3m0", "stochastic"), 128 * 300, 9
    noise = uniform(n, seed, torch.device("cpu")).double()
    low = 2.0 ** torch.randint(-6, 0, (n,), generator=torch.Generator().manual_seed(0)).double()
    whole = (noise * 2**23).ceil() + beside
    x = torch.where((whole >= 0) & (whole < 2**23), low * (1 + whole * 2.0**-23), low)
    x[::128] = 1.0  # the scale of every block
    below = x.log2().floor()
    expected = 7 + below + (x - 2.0**below > noise * 2.0**below).double()
    expected[::128] = 7  # there is nothing above
    codes = blocks.encode(x.float(), form, seed)[: n // 2]
    assert torch.equal(blocks.unpack(codes, n).double(), expected)
    check(x.float(), form, seed, device)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_kernels_take_and_give_other_types(device: torch.device, name: str, dtype: torch.dtype) -> None:
    check(numbers("halves", 1001, 2).to(dtype), form_of(name, "nearest"), 0, device, out=dtype)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_code_nothing_to_nothing(device: torch.device, name: str) -> None:
    form = form_of(name, "nearest")
    nothing = torch.zeros(0, device=device)
    assert kernels.encode(nothing, form, 0).numel() == 0
    kernels.sum_into(torch.zeros(1, 0, dtype=torch.uint8, device=device), nothing, form)


@pytest.mark.parametrize("name", NAMES)
def test_sums_fill_a_target_that_is_not_contiguous(device: torch.device, name: str) -> None:
    form = form_of(name, "nearest")
    rows = blocks.encode(numbers("ordinary", 300, 3), form, 0)[None]
    target = torch.zeros(300, 2, device=device)
    expected = torch.empty(300)
    blocks.sum_into(rows, expected, form)
    kernels.sum_into(rows.to(device), target[:, 1], form)
    assert same(target[:, 1].contiguous(), expected)
    assert not target[:, 0].any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_plain_torch_on_a_gpu_makes_the_same_bytes(name: str, rounding: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    form = form_of(name, rounding)
    for kind in KINDS:
        x = numbers(kind, 70_001, 1)
        assert torch.equal(blocks.encode(x.cuda(), form, 3).cpu(), blocks.encode(x, form, 3))


def test_kernels_are_used_on_gpus_and_only_where_triton_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert arithmetic(torch.device("cuda", 0)) is kernels
    assert arithmetic(torch.device("cpu")) is blocks
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert arithmetic(torch.device("cuda", 0)) is blocks


@pytest.mark.slow
def test_compiled_for_gpus_no_kernel_approximates_contracts_or_flushes_denormals(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "compile_kernels.py"
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found.pop("hip") == ["compiled"]
    assert found == {name: ["div.rn.f32", "mul.rn.f32"] for name in found}
    assert len(found) == 3
