"""Attention inside packed documents against the dense mask: outputs, gradients, layouts, and how torch is called."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.model import packed
from thinwire.model.packed import Packed, Segment, attend_packed, dense_mask, pack
from thinwire.model.spec import ModelSpec
from thinwire.model.transformer import Transformer

CPU = torch.device("cpu")
K = 8


def packed_of(documents: Tensor) -> Packed:
    made = pack(documents, like=torch.zeros(0, dtype=torch.float64), head_size=K)
    assert made is not None
    return made


def dense(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = dense_mask(documents)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def numbers(b: int, t: int, heads: int, groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(b * t)
    made = torch.randn(b, t, heads + 2 * groups, K, dtype=torch.float64, generator=generator)
    return [x.requires_grad_() for x in made.split([heads, groups, groups], dim=2)]  # views, as the model has them


def check(documents: Tensor, heads: int, groups: int) -> None:
    qkv = numbers(*documents.shape, heads, groups)
    made, right = attend_packed(*qkv, packed_of(documents)), dense(*qkv, documents)
    torch.testing.assert_close(made, right)
    weights = torch.randn_like(right)
    for one, other in zip(*(torch.autograd.grad((y * weights).sum(), qkv) for y in (made, right)), strict=True):
        torch.testing.assert_close(one, other)


@st.composite
def layouts(draw: st.DrawFn) -> Tensor:
    """Ids that rise along rows, by steps of any size; the next row may go on with the same document."""
    b, t = draw(st.integers(1, 3)), draw(st.integers(1, 150))
    share = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]))
    steps = torch.rand(b, t, generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))) < share
    return (steps * draw(st.integers(1, 5))).cumsum(1) + draw(st.integers(0, 9))


@given(documents=layouts(), heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]))
@settings(max_examples=60)
def test_any_layout_gives_what_the_dense_mask_gives(documents: Tensor, heads: tuple[int, int]) -> None:
    check(documents, *heads)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
def test_documents_of_one_length_go_in_one_batch(length: int) -> None:
    documents = (torch.arange(3 * length) // length)[None].repeat(2, 1)
    assert packed_of(documents).segments == (Segment(6, length),)
    check(documents, 4, 2)


def test_short_neighbours_go_together_and_long_documents_alone() -> None:
    lengths = [3, 5, 60, 70, 1, 2]
    documents = torch.arange(6).repeat_interleave(torch.tensor(lengths))[None]
    segments = packed_of(documents).segments
    assert [segment.tokens for segment in segments] == [8, 60, 70, 3]
    assert [segment.mask_LL is not None for segment in segments] == [True, False, False, True]


def test_the_work_is_the_sum_of_squares() -> None:
    """No pair of tokens is looked at that a document of 64 tokens, or neighbours of as many in all, do not have."""
    documents = (torch.rand(4, 2048, generator=torch.Generator().manual_seed(0)) < 1 / 40).cumsum(1)
    segments = packed_of(documents).segments
    assert sum(segment.count * segment.tokens for segment in segments) == documents.numel()
    squares = sum(int((documents[row] == one).sum()) ** 2 for row in range(4) for one in documents[row].unique())
    assert sum(segment.count * segment.tokens**2 for segment in segments) <= squares + 64 * documents.numel()
    assert squares < 4 * 2048**2 / 20


def test_ids_that_come_back_go_through_the_dense_mask() -> None:
    documents = torch.tensor([[1, 1, 2, 2, 1, 1]])
    assert pack(documents, like=torch.zeros(0, dtype=torch.float64), head_size=K) is None
    spec = ModelSpec(vocab_size=9, hidden=16, layers=1, heads=2, kv_heads=2, head_size=8, ffn=8, max_tokens=6)
    model = Transformer(spec).double()
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    made = model(tokens, documents_BT=documents)
    changed = model(torch.tensor([[1, 2, 3, 8, 5, 6]]), documents_BT=documents)
    assert torch.equal(made[0, 4:], changed[0, 4:])  # the other document is not seen ...
    assert not torch.allclose(made[0, 5], model(torch.tensor([[1, 7, 3, 4, 5, 6]]), documents_BT=documents)[0, 5])


@pytest.mark.parametrize("takes", ["is_causal", "window_size", "window_size and enable_gqa"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_variable_length_attention_is_called_as_each_torch_has_it(
    takes: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stood in for by plain attention per document: it runs on GPUs only."""
    from torch.nn.attention import varlen

    def plain(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, same: Tensor, longest: int, too: int) -> Tensor:
        assert bounds is same and bounds.dtype == torch.int32
        lengths = bounds.diff().tolist()
        assert longest == too >= max(lengths)
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        out = [F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part), is_causal=True) for part in parts]
        return torch.cat([y.transpose(0, 1) for y in out])

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k.repeat_interleave(q.shape[1] // k.shape[1], 1), v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    def old(q: Any, k: Any, v: Any, a: Any, b: Any, c: Any, d: Any, is_causal: bool = False) -> Tensor:
        assert is_causal
        return plain(q, k, v, a, b, c, d)

    def newer(q: Any, k: Any, v: Any, a: Any, b: Any, c: Any, d: Any, *, window_size: Any = (-1, -1)) -> Tensor:
        assert window_size == (-1, 0)
        return plain(q, k, v, a, b, c, d)

    def newest(
        q: Any, k: Any, v: Any, a: Any, b: Any, c: Any, d: Any, *, window_size: Any = (-1, -1), enable_gqa: bool = False
    ) -> Tensor:
        assert window_size == (-1, 0)
        assert enable_gqa == (q.shape[1] != k.shape[1])
        return plain(q, *repeated(q, k, v), a, b, c, d)

    stand_in = {"is_causal": old, "window_size": newer, "window_size and enable_gqa": newest}[takes]
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(packed, "has_varlen", lambda device, dtype, head_size: True)
    documents = torch.tensor([[0] * 5 + [1] * 7 + [2], [2] * 12 + [3]])
    assert packed_of(documents).longest == 16
    check(documents, *heads)


def test_variable_length_attention_is_for_halves_on_nvidia_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert packed.has_varlen(gpu, torch.bfloat16, 128)
    assert not packed.has_varlen(gpu, torch.float32, 128)
    assert not packed.has_varlen(gpu, torch.bfloat16, 100)
    assert not packed.has_varlen(CPU, torch.bfloat16, 128)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not packed.has_varlen(gpu, torch.bfloat16, 128)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_documents_give_what_the_dense_mask_gives(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    documents = (torch.rand(2, 512, generator=torch.Generator().manual_seed(0)) < 1 / 60).cumsum(1)
    q, k, v = (torch.randn(2, 512, n, 64, device="cuda", dtype=dtype, requires_grad=True) for n in (4, 2, 2))
    made = pack(documents, like=q, head_size=64)
    assert made is not None
    got, right = attend_packed(q, k, v, made), dense(q, k, v, documents.cuda())
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(got, right, atol=tolerance, rtol=tolerance)
    for one, other in zip(*(torch.autograd.grad(y.sum(), (q, k, v)) for y in (got, right)), strict=True):
        torch.testing.assert_close(one, other, atol=5 * tolerance, rtol=5 * tolerance)
