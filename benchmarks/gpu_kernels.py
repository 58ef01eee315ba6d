"""Kernels of the GPU check: the codecs' bits and speed, and loss and document attention against their references."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from gpu_rows import Row
from torch import Tensor

from thinwire.comm.codecs.codec import make_codec
from thinwire.model.loss import linear_loss
from thinwire.model.packed import attend_packed, dense_mask, pack

SHARE = {"int4-hadamard": 0.75}
"""Least share of a copy's speed; of all others 0.85."""
ROUNDINGS = ("nearest", "stochastic")


def speed_of_codecs() -> ModuleType:
    """`codecs.py` beside this file, whose name is also that of a module of Python's."""
    spec = importlib.util.spec_from_file_location("codec_speed", Path(__file__).with_name("codecs.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def codec_rows(device: torch.device, *, dry: bool) -> Iterator[Row]:
    """Bytes beside the CPU's, of so many numbers that one in ten million would show; then shares of a copy's speed."""
    many, some = (2**14, 2**14) if dry else (2**27, 2**24)
    x = torch.randn(many, generator=torch.Generator().manual_seed(0))
    here = x.to(device)
    speeds = speed_of_codecs()
    scratch = torch.empty_like(here)
    for name in speeds.NAMES:
        for rounding in ROUNDINGS if name != "bf16" else ROUNDINGS[:1]:
            codec = make_codec(name, rounding=rounding)  # type: ignore[arg-type]
            n = many if rounding == "stochastic" else some
            differ = int((codec.encode(here[:n]).cpu() != codec.encode(x[:n])).sum())
            what = f"{name}, {rounding}"
            yield Row("codec bits", what, f"{differ} of {codec.wire_bytes(n):,} bytes differ", "none", differ == 0)
            copy_s, encode_s, decode_s, sum_s = speeds.measured(codec, here, scratch, 3 if dry else 9)
            encode, decode, summing = copy_s / encode_s, copy_s / decode_s, copy_s / sum_s
            aim = SHARE.get(name, 0.85)
            said = f"encode {encode:.2f}, decode {decode:.2f}, sum {summing:.2f}"
            fast = min(encode, decode, summing) >= aim
            yield Row("codec speed", what, said, f"at least {aim} of a copy's", fast, speed=True)


def reference_rows(device: torch.device, *, dry: bool) -> Iterator[Row]:
    """The fused loss beside fp64 cross entropy, and documents beside the dense mask: outputs and gradients."""
    dtype = torch.float32 if dry else torch.bfloat16
    n, d, v = (300, 16, 500) if dry else (8192, 256, 50_001)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in ((n, d), (v, d)))
    targets = torch.randint(0, v, (n,), generator=generator).to(device)
    targets[::7] = -100
    exact = F.cross_entropy(x.double() @ weight.double().T, targets, ignore_index=-100, reduction="sum")
    yield _beside("loss", linear_loss(x, weight, targets), exact, [x, weight], dtype)
    documents = (torch.rand(2, 256 if dry else 2048, generator=generator) < 1 / 50).cumsum(1)
    q, k, v_ = (
        torch.randn(*documents.shape, heads, 64, generator=generator).to(device, dtype).requires_grad_()
        for heads in (8, 4, 4)
    )
    packed = pack(documents, like=q, head_size=64)
    assert packed is not None
    mask = dense_mask(documents).to(device)[:, None]
    dense = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v_)), attn_mask=mask, enable_gqa=True)
    how = "varlen attention" if packed.bounds_S is not None else "one by one"
    weights = torch.randn(q.shape, generator=generator).to(device, dtype)
    made = (attend_packed(q, k, v_, packed) * weights).sum()
    yield _beside(f"documents, {how}", made, (dense.transpose(1, 2) * weights).sum(), [q, k, v_], dtype)


def _beside(what: str, made: Tensor, exact: Tensor, wanted: list[Tensor], dtype: torch.dtype) -> Row:
    """Both values, and the largest relative distance (2-norm) of the gradients."""
    pairs = zip(torch.autograd.grad(made, wanted), torch.autograd.grad(exact, wanted), strict=True)
    worst = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)
    most = 1e-4 if dtype == torch.float32 else 3e-2
    said = f"value {made.item():.4f} and {exact.item():.4f}, gradients within {worst:.1e}"
    return Row("references", what, said, f"within {most:.0e}", worst <= most)
