"""In which precisions a parameter is computed with, kept and sent, and how it lies in a flat buffer of real numbers."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thinwire.errors import UseError

COMPUTE_DTYPES: Mapping[str, torch.dtype] = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
_PAIRS = {torch.complex64: torch.float32, torch.complex128: torch.float64}
_MASTERED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def computed_in(dtype: torch.dtype, chosen: str) -> torch.dtype:
    """fp32 weights are computed with in the plan's precision; others keep the one they were given in."""
    return COMPUTE_DTYPES[chosen] if dtype == torch.float32 else dtype


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """Masters, gradient sums and optimizer states: fp64 for fp64 weights, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Kind:
    """What parameters of one flat buffer have in common.

    `seen` is what a parameter is, where that is not what the buffer holds: a complex one is pairs of real numbers, one of
    whole numbers, flags or fp8 (always frozen: the base of a quantised model) is its bytes, which nothing rounds.
    """

    trained: bool
    compute: torch.dtype
    master: torch.dtype
    seen: torch.dtype | None = None

    @staticmethod
    def of(name: str, parameter: nn.Parameter, chosen: str) -> "Kind":
        """The kind of a parameter under the plan's compute precision. Raises UseError for what cannot be trained."""
        dtype, trained = parameter.dtype, parameter.requires_grad
        if dtype in _PAIRS:
            return Kind(trained, _PAIRS[dtype], _PAIRS[dtype], dtype)
        if dtype in _MASTERED:
            return Kind(trained, computed_in(dtype, chosen), master_dtype(dtype))
        if trained:
            raise UseError(
                f"{name} is trained in {dtype}, which has no master; make it fp32, or freeze it before shard()"
            )
        return Kind(trained, torch.uint8, torch.uint8, dtype)

    @property
    def exact(self) -> bool:
        """Whether the buffer holds bytes, which no codec may touch."""
        return self.master == torch.uint8

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a parameter as numbers of the buffer."""
        if self.seen is None:
            return tuple(shape)
        return (*shape, 2 if not self.exact else self.seen.itemsize)

    def numbers(self, values: Tensor) -> Tensor:
        """(n,) what a parameter, or its gradient, is in the buffer."""
        if values.layout != torch.strided:  # the gradient of a sparse embedding
            values = values.to_dense()
        if self.seen is None:
            return values.flatten()
        if not self.exact:
            return torch.view_as_real(values.resolve_conj()).flatten()
        return values.contiguous().view(-1).view(torch.uint8)

    def view(self, numbers: Tensor, shape: Sequence[int]) -> Tensor:
        """A part of the buffer as a parameter of `shape` (in numbers of the buffer)."""
        if self.seen is None:
            return numbers.view(tuple(shape))
        if not self.exact:
            return torch.view_as_complex(numbers.view(tuple(shape)))
        return numbers.view(self.seen).view(tuple(shape[:-1]))

    def nothing(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """A parameter of `shape` (in numbers of the buffer) that takes no memory: not a number, where there is such."""
        dtype = self.compute if self.seen is None else self.seen
        fill = 0.0 if self.exact else math.nan
        outside = tuple(shape) if self.seen is None else tuple(shape[:-1])
        return torch.full((), fill, device=device).to(dtype).expand(outside)


def sum_of_squares(x: Tensor) -> float:
    """Of all elements, accumulated in fp64, without a copy of `x` in fp64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def norm_of(squares: float, dtypes: Collection[torch.dtype]) -> float:
    """The 2-norm, rounded to fp32 unless gradients are finer, so that the order of summing does not show; NaN stays."""
    norm = math.sqrt(squares) if squares >= 0 else math.nan
    return norm if torch.float64 in dtypes else float(torch.tensor(norm, dtype=torch.float32))
