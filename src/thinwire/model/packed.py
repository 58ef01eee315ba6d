"""Causal attention inside documents that are packed back to back: each is attended to alone, so the work is the sum of
the squares of their lengths and no (T, T) mask is made.

On GPUs whose torch has it, by variable-length flash attention (`torch.nn.attention.varlen`, after FlashAttention-2, arXiv
2307.08691). Elsewhere documents are cut out and go through `scaled_dot_product_attention` one by one; consecutive short ones
together, with a mask among them, for a call has a price; equally long ones in one batch. Reference: `dense_mask`.

Shapes: B batch, T tokens, N = B x T, L tokens of a segment, H query heads, G key/value heads, K head size, S documents
"""

import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

JOINED = {"cpu": 64}
JOINED_ELSEWHERE = 512
"""Documents are attended to together while they have at most so many tokens in all."""


@dataclass(frozen=True)
class Segment:
    """`count` documents of `tokens` tokens each; or one stretch of several documents, told apart by a mask."""

    count: int
    tokens: int
    mask_LL: Tensor | None = None


@dataclass(frozen=True)
class Packed:
    """How the N tokens of a batch fall into documents; none goes on in the next row."""

    segments: tuple[Segment, ...] = ()
    bounds_S: Tensor | None = None
    """(S + 1,) int32 on the device: where documents begin, and N; only where variable-length attention is at hand."""
    longest: int = 0
    """No document is longer: a power of two, so that compiled code sees few values."""


def pack(documents_BT: Tensor, *, like: Tensor, head_size: int) -> Packed | None:
    """What attention has to know of documents, from an id per token, for numbers on the device and of the kind of `like`.

    None if a document goes on after another has begun. Reads the ids on the host: give them there, or a GPU is waited for.
    """
    ids_BT = documents_BT.cpu()
    if (ids_BT.diff(dim=1) < 0).any():
        return None
    begins_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    begins_BT[:, 1:] = ids_BT.diff(dim=1) != 0
    begins_S = begins_BT.flatten().nonzero().flatten()
    bounds_S = torch.cat([begins_S, torch.tensor([ids_BT.numel()])])
    lengths = bounds_S.diff().tolist()
    if has_varlen(like.device, like.dtype, head_size):
        longest = 1 << (max(lengths) - 1).bit_length()
        return Packed(bounds_S=bounds_S.int().to(like.device, non_blocking=True), longest=longest)
    return Packed(tuple(_segments(lengths, like.device)))


def attend_packed(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, packed: Packed) -> Tensor:
    """(B, T, H, K): every query attends to what came before it in its document, and to itself."""
    if packed.bounds_S is not None:
        return _attend_varlen(q_BTHK, k_BTGK, v_BTGK, packed.bounds_S, packed.longest)
    out: Tensor = _attend_segments(q_BTHK, k_BTGK, v_BTGK, packed)
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]  # lengths change: each would be compiled anew
def _attend_segments(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, packed: Packed) -> Tensor:
    lengths = [segment.count * segment.tokens for segment in packed.segments]
    # `split`, not slices: the gradient of each slice would be as long as all of them.
    parts = zip(*(torch.split(x.flatten(0, 1), lengths) for x in (q_BTHK, k_BTGK, v_BTGK)), strict=True)
    out = [_attend(segment, *qkv) for segment, qkv in zip(packed.segments, parts, strict=True)]
    return torch.cat(out).view(q_BTHK.shape)


def _attend_varlen(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, bounds_S: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    windowed, grouped = _varlen_takes()
    options: dict[str, Any] = {"window_size": (-1, 0)} if windowed else {"is_causal": True}
    groups = q_BTHK.shape[2] // k_BTGK.shape[2]
    if grouped:
        options["enable_gqa"] = groups > 1
    elif groups > 1:
        k_BTGK, v_BTGK = (x.repeat_interleave(groups, dim=2) for x in (k_BTGK, v_BTGK))
    q, k, v = (x.flatten(0, 1).contiguous() for x in (q_BTHK, k_BTGK, v_BTGK))
    made: Any = varlen_attn(q, k, v, bounds_S, bounds_S, longest, longest, **options)
    y_NHK: Tensor = made
    return y_NHK.view(q_BTHK.shape)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _varlen_takes() -> tuple[bool, bool]:
    """Whether it takes `window_size` (2.10 has `is_causal` instead), and `enable_gqa` (since 2.12)."""
    from torch.nn.attention.varlen import varlen_attn

    takes = inspect.signature(varlen_attn).parameters
    return "window_size" in takes, "enable_gqa" in takes


def dense_mask(documents_BT: Tensor) -> Tensor:
    """(B, T, T), true where a query may look: the reference, and what any order of ids goes through."""
    T = documents_BT.shape[1]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=documents_BT.device).tril()
    return causal_TT & (documents_BT[:, :, None] == documents_BT[:, None, :])


def has_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether torch has variable-length attention for such tensors: flash attention's conditions."""
    if device.type != "cuda" or torch.version.hip is not None or dtype not in (torch.bfloat16, torch.float16):
        return False
    fits = head_size % 8 == 0 and head_size <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)
    return fits and importlib.util.find_spec("torch.nn.attention.varlen") is not None


def _attend(segment: Segment, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
    shape = (segment.count, segment.tokens)
    q, k, v = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in (q_NHK, k_NGK, v_NGK))
    mask_LL = segment.mask_LL
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_LL, is_causal=mask_LL is None, enable_gqa=grouped)
    return y.transpose(1, 2).flatten(0, 1)


def _segments(lengths: Sequence[int], device: torch.device) -> Iterator[Segment]:
    """Runs of equally long documents in one batch; of others, consecutive short ones under a mask."""
    together = JOINED.get(device.type, JOINED_ELSEWHERE)
    waiting: list[int] = []
    for length, run in groupby(lengths):
        count = len(list(run))
        if count > 1 or length > together:
            yield from _joined(waiting, device)
            waiting = []
            yield Segment(count, length)
            continue
        if sum(waiting) + length > together:
            yield from _joined(waiting, device)
            waiting = []
        waiting.append(length)
    yield from _joined(waiting, device)


def _joined(lengths: Sequence[int], device: torch.device) -> Iterator[Segment]:
    if len(lengths) > 1:
        ids_L = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        yield Segment(1, len(ids_L), dense_mask(ids_L[None])[0].to(device, non_blocking=True))
    elif lengths:
        yield Segment(1, lengths[0])
