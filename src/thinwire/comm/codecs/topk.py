"""Top-k per chunk in 14 bits a number: 12 for its place, one for its sign, one for which of two magnitudes it has.

Every chunk of 4096 keeps its 64 largest; the magnitudes are the means of the upper and the lower half of the kept range.
It loses most of what it is given, so it is meant to run with error feedback (SparseLoCo, arXiv 2508.15706, keeps 1-3 %
in 2 bits). Not finite input decodes to NaN, so that a diverged group is not averaged in silence.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from thinwire.comm.codecs.codec import sum_decoded
from thinwire.plan.compression import TOPK_CHUNK, topk_kept, wire_bytes


class TopK:
    """Flat tensors to the places and rough sizes of their largest elements, and back."""

    name = definition = "topk"

    def encode(self, x_n: Tensor, *, seed: int = 0) -> Tensor:
        """(n,) floating point -> (wire_bytes(n),) uint8."""
        n = x_n.numel()
        chunks, kept, rest = topk_kept(n)
        x_n = x_n.float()
        coded = [_encode(x_n[: chunks * TOPK_CHUNK].view(chunks, TOPK_CHUNK), kept)]
        if rest:
            coded.append(_encode(x_n[chunks * TOPK_CHUNK :].view(1, -1), rest))
        return torch.cat(coded)

    def decode(self, coded: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        """(wire_bytes(n),) uint8 -> (n,) of `dtype`, zero where nothing was kept."""
        chunks, kept, rest = topk_kept(n)
        end = self.wire_bytes(chunks * TOPK_CHUNK)
        parts = [_decode(coded[:end], chunks, TOPK_CHUNK, kept)]
        if rest:
            parts.append(_decode(coded[end:], 1, n - chunks * TOPK_CHUNK, rest))
        return torch.cat(parts).to(dtype)

    def sum_into(self, coded_rc: Tensor, out_n: Tensor, *, add: bool = False) -> None:
        """`out_n` becomes the sum of what the rows of (r, wire_bytes(n)) decode to, in their order."""
        sum_decoded(self.decode, coded_rc, out_n, add=add)

    def wire_bytes(self, n: int) -> int:
        """Bytes that n elements take on the wire."""
        return wire_bytes(self.name, n, block=0, element_bytes=0)


# C chunks, L elements of a chunk, K kept of them, B bytes


def _encode(x_CL: Tensor, kept: int) -> Tensor:
    """-> all places and codes, then all magnitudes."""
    if x_CL.shape[0] == 0:
        return torch.empty(0, dtype=torch.uint8, device=x_CL.device)
    size_CL = x_CL.abs()
    size_CK, place_CK = size_CL.topk(kept, dim=1)
    place_CK, order_CK = place_CK.sort(dim=1)
    size_CK = size_CK.gather(1, order_CK)
    middle_C1 = (size_CK.amax(1, keepdim=True) + size_CK.amin(1, keepdim=True)) / 2
    large_CK = size_CK >= middle_C1
    means_C2 = torch.stack([_mean(size_CK, ~large_CK), _mean(size_CK, large_CK)], dim=1).to(torch.bfloat16)
    means_C2[~size_CL.isfinite().all(1)] = torch.nan
    negative_CK = x_CL.gather(1, place_CK) < 0
    codes_CK = place_CK.int() | (negative_CK.int() << 12) | (large_CK.int() << 13)
    return torch.cat([_pack14(codes_CK).flatten(), means_C2.flatten().view(torch.uint8)])


def _decode(coded: Tensor, chunks: int, length: int, kept: int) -> Tensor:
    x_CL = torch.zeros(chunks, length, device=coded.device)
    if chunks == 0:
        return x_CL.flatten()
    packed = -(-kept * 14 // 8)
    codes_CK = _unpack14(coded[: chunks * packed].view(chunks, packed), kept)
    means_C2 = coded[chunks * packed :].clone().view(torch.bfloat16).float().view(chunks, 2)
    size_CK = means_C2.gather(1, (codes_CK >> 13).long())
    x_CL.scatter_(1, (codes_CK & 0xFFF).long(), torch.where((codes_CK >> 12) & 1 == 1, -size_CK, size_CK))
    return x_CL.flatten()


def _mean(size_CK: Tensor, chosen_CK: Tensor) -> Tensor:
    """Row means of the chosen; 0 where none is."""
    return (size_CK * chosen_CK).sum(1) / chosen_CK.sum(1).clamp(min=1)


def _pack14(codes_CK: Tensor) -> Tensor:
    """(C, K) numbers below 2^14 -> (C, ceil(14 K / 8)) bytes, little end first."""
    shifts = torch.arange(14, device=codes_CK.device)
    bits = ((codes_CK[:, :, None] >> shifts) & 1).flatten(1)
    bits = pad(bits, (0, -bits.shape[1] % 8)).view(codes_CK.shape[0], -1, 8)
    return (bits << torch.arange(8, device=bits.device)).sum(2).to(torch.uint8)


def _unpack14(packed_CB: Tensor, kept: int) -> Tensor:
    """The inverse of `_pack14`: (C, K) int32."""
    bits = ((packed_CB[:, :, None].int() >> torch.arange(8, device=packed_CB.device)) & 1).flatten(1)
    codes = bits[:, : kept * 14].view(packed_CB.shape[0], kept, 14)
    return (codes << torch.arange(14, device=bits.device)).sum(2).int()
