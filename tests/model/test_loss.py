"""The loss fused with the head against F.cross_entropy on full logits: values, gradients, memory, and its kernel."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from peak import Peak
from thinwire.model import loss
from thinwire.model.loss import linear_loss, softmax_gradient_, softmax_loss, token_loss

# N tokens, D hidden, V vocabulary
Case = tuple[Tensor, Tensor, Tensor, Tensor]


def case(n: int, d: int, v: int, dtype: torch.dtype = torch.float64, *, ignored: float = 0.2, seed: int = 0) -> Case:
    """Hidden states, weights, bias and targets, some of which are negative."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in ((n, d), (v, d), (v,)))
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < ignored] = -100
    return x, weight, bias, targets


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """All logits at once, in fp64."""
    logits = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def gradients(made: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(made / 7, wanted))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "loss_chunk", lambda vocabulary, *, cpu: 5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("n", "v"), [(1, 1), (5, 7), (23, 11), (40, 257)])
def test_values_and_gradients_are_those_of_cross_entropy(dtype: torch.dtype, with_bias: bool, n: int, v: int) -> None:
    x, weight, bias, targets = case(n, 12, v, dtype)
    given = bias if with_bias else None
    expected, made = reference(x, weight, given, targets), linear_loss(x, weight, targets, given)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert made.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert made.item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
    wanted = [x, weight, *([bias] if with_bias else [])]
    for got, right in zip(gradients(made, wanted), gradients(expected, wanted), strict=True):
        assert got.dtype == dtype
        assert (got - right).norm() <= tolerance * right.norm() + 1e-12


@pytest.mark.usefixtures("small_chunks")
def test_derivatives_are_right_by_finite_differences() -> None:
    x, weight, bias, targets = case(12, 4, 6)
    assert torch.autograd.gradcheck(
        lambda *given: linear_loss(given[0], given[1], targets, given[2]), (x, weight, bias)
    )
    logits = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given: token_loss(given, targets), (logits,))


@pytest.mark.usefixtures("small_chunks")
@given(data=st.data())
@settings(max_examples=30)
def test_any_shape_and_any_targets_give_the_loss_of_given_logits(data: st.DataObject) -> None:
    n, d, v = (data.draw(st.integers(1, most)) for most in (40, 9, 33))
    x, weight, _, targets = case(n, d, v, ignored=data.draw(st.sampled_from([0.0, 0.5, 1.0])), seed=n * d * v)
    fused, plain = linear_loss(x, weight, targets), token_loss(x @ weight.T, targets)
    torch.testing.assert_close(fused, plain)
    for one, other in zip(gradients(fused, [x, weight]), gradients(plain, [x, weight]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_wants_a_gradient_gets_one(frozen: str) -> None:
    x, weight, _, targets = case(9, 4, 6)
    fixed, trained = (x, weight) if frozen == "hidden" else (weight, x)
    fixed.requires_grad_(False)
    linear_loss(x, weight, targets).backward()  # type: ignore[no-untyped-call]
    assert fixed.grad is None
    assert trained.grad is not None
    torch.testing.assert_close(trained.grad, torch.autograd.grad(reference(x, weight, None, targets), trained)[0])


def test_without_gradients_the_loss_is_the_same_number() -> None:
    x, weight, bias, targets = case(300, 8, 50)
    with torch.no_grad():
        evaluated = linear_loss(x, weight, targets, bias)
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, linear_loss(x, weight, targets, bias).detach())


@pytest.mark.parametrize("of_logits", [False, True])
def test_where_all_targets_are_left_out_loss_and_gradients_are_zero(of_logits: bool) -> None:
    x, weight, _, targets = case(9, 4, 6, torch.float32)
    targets[:] = torch.tensor([-100, -1, -7] * 3)
    made = token_loss(x @ weight.T, targets) if of_logits else linear_loss(x, weight, targets)
    assert made.item() == 0.0
    assert not any(grad.any() for grad in gradients(made, [x, weight]))


def test_logits_that_are_no_numbers_do_no_harm_where_nothing_is_scored() -> None:
    logits = torch.randn(9, 6, requires_grad=True)
    targets = torch.tensor([1, 2, 3, 4, -100, 0, 5, 1, 2])
    kept = targets >= 0
    expected = F.cross_entropy(logits[kept], targets[kept], reduction="sum")
    (right,) = torch.autograd.grad(expected, logits)
    with torch.no_grad():
        logits[4] = torch.nan
    made = token_loss(logits, targets)
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(torch.autograd.grad(made, logits)[0], right)


def test_a_token_gets_the_same_gradient_whoever_is_beside_it(small_chunks: None) -> None:
    x, weight, _, targets = case(23, 4, 6, ignored=0.0)
    (grad,) = gradients(linear_loss(x, weight, targets), [x])
    order = torch.randperm(23)
    (mixed,) = gradients(linear_loss(x[order], weight, targets[order]), [x])
    torch.testing.assert_close(mixed, grad)
    (alone,) = gradients(linear_loss(x[11:12], weight, targets[11:12]), [x])
    torch.testing.assert_close(alone[11], grad[11])


def test_two_passes_give_the_same_bits_and_a_graph_that_is_kept_the_same_gradient_twice() -> None:
    x, weight, _, targets = case(700, 16, 301, torch.float32)
    made = linear_loss(x, weight, targets)
    first = torch.autograd.grad(made / 3, [x, weight], retain_graph=True)
    again = torch.autograd.grad(made / 3, [x, weight])
    other = torch.autograd.grad(linear_loss(x, weight, targets) / 3, [x, weight])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, other, strict=True))


def test_a_sure_prediction_keeps_its_small_gradient_in_half_precision() -> None:
    """p - 1 in fp32, then rounded: the half-precision p = 0.99909 is 1."""
    logits = torch.tensor([[7.0, 0.0]], dtype=torch.bfloat16)
    softmax_gradient_(logits, torch.tensor([0]))
    assert logits[0, 0].item() == pytest.approx(-0.00091105, rel=4e-3)


def test_autocast_computes_the_head_in_its_precision() -> None:
    x, weight, _, targets = case(64, 16, 40, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = linear_loss(x, weight, targets)
    half = linear_loss(x.bfloat16(), weight.bfloat16(), targets)
    assert made.item() == half.item()
    grads = gradients(made, [x, weight])
    assert [grad.dtype for grad in grads] == [torch.float32] * 2
    for got, right in zip(grads, gradients(half, [x, weight]), strict=True):
        assert torch.equal(got, right)


def test_shapes_alone_go_through_it() -> None:
    x, weight = (torch.zeros(shape, device="meta", requires_grad=True) for shape in ((2, 9, 4), (6, 4)))
    with torch.no_grad():
        assert linear_loss(x, weight, torch.zeros(2, 9, dtype=torch.long, device="meta")).shape == ()


class Widest(TorchDispatchMode):
    """The most elements of a tensor that any operation makes in fp32 or wider, and in any precision."""

    def __init__(self) -> None:
        super().__init__()
        self.exact, self.any = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.any = max(self.any, tensor.numel())
                self.exact = max(self.exact, tensor.numel() if tensor.dtype.itemsize >= 4 else 0)
        return out


N, D, V = 2048, 32, 4001


def _fused(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_loss(x, weight, targets)


def _of_logits(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return token_loss(F.linear(x, weight), targets)


@pytest.mark.parametrize(("forward", "logits_there"), [(_fused, False), (_of_logits, True)], ids=["fused", "of logits"])
def test_no_tokens_times_vocabulary_in_fp32(forward: Callable[..., Tensor], logits_there: bool) -> None:
    """Nor in any precision where head and loss are one; forward and backward."""
    x, weight, _, targets = case(N, D, V, torch.bfloat16)
    with Widest() as widest:
        forward(x, weight, targets).backward()  # type: ignore[no-untyped-call]
    assert widest.exact <= N * V / 7
    assert (widest.any == N * V) == logits_there
    with torch.no_grad(), Widest() as widest:
        linear_loss(x, weight, targets)
    assert widest.any <= N * V / 7


def test_the_peak_is_a_chunk_of_logits_and_the_gradients() -> None:
    x, weight, _, targets = case(N, D, V, torch.bfloat16)
    with Peak() as peak:
        linear_loss(x, weight, targets).backward()  # type: ignore[no-untyped-call]
    chunk = 128 * V * (2 + 4 + 4)  # half precision, its fp32 form, log-softmax
    held = (N * D + V * D) * 2 * 2 + V * D * 4  # x and weights, their gradients; sums of the weights'
    assert peak.most <= (chunk + held) * 1.1
    assert peak.most < N * V * 2


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    pytest.importorskip("triton", reason="Triton is not installed: pip install thinwire[gpu]")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    if request.param == "interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is a GPU here: the kernel is compiled for it, not interpreted")
    return torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.mark.parametrize("v", [1, 50, 1024, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_does_what_plain_torch_does(device: torch.device, v: int, dtype: torch.dtype) -> None:
    from thinwire.model import triton_loss

    _, _, _, targets = case(6, 1, v)
    targets[0] = -100
    logits = torch.randn(6, v, generator=torch.Generator().manual_seed(1)).mul(3).to(dtype)
    logits[2, : v // 2] = -torch.inf  # a vocabulary that is padded: a whole block of it where it is large
    targets[2] = v - 1
    expected, made = logits.clone(), logits.to(device, copy=True)
    plain = softmax_gradient_(expected, targets)
    fused = triton_loss.softmax_gradient_(made, targets.to(device))
    assert fused.item() == pytest.approx(plain.item(), rel=1e-5)
    # two roundings of nearly the same number differ in the last bit at most
    torch.testing.assert_close(made.cpu(), expected, rtol=8e-3 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)
    assert not made[0].any()
    assert plain.item() == pytest.approx(softmax_loss(logits, targets).item(), rel=1e-5)


def test_the_kernel_says_that_a_row_is_not_a_number(device: torch.device) -> None:
    from thinwire.model import triton_loss

    logits = torch.zeros(2, 9, device=device)
    logits[1, 3] = torch.nan
    assert triton_loss.softmax_gradient_(logits, torch.tensor([1, 2], device=device)).isnan()


@pytest.mark.gpu
def test_on_a_gpu_head_and_loss_are_those_of_the_reference() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    x, weight, _, targets = (each.detach().cuda() for each in case(9000, 64, 20_001, torch.bfloat16))
    x.requires_grad_(), weight.requires_grad_()
    made, expected = linear_loss(x, weight, targets), reference(x, weight, None, targets)
    assert made.item() == pytest.approx(expected.item(), rel=1e-2)
    for got, right in zip(gradients(made, [x, weight]), gradients(expected, [x, weight]), strict=True):
        assert (got - right).norm() <= 2e-2 * right.norm()


def test_the_kernel_compiles_for_gpus_without_one(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install thinwire[gpu]")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).parents[1] / "compile_kernels.py"
    done = subprocess.run(
        [sys.executable, script, "loss"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == {"cuda": ["compiled"], "hip": ["compiled"]}
