"""A device beside the CPU, on any machine: tensors that no operation mixes with the CPU's, as with a real accelerator.

torch's dispatcher sends what is on its spare device to Python here. The numbers lie in ordinary memory, so results are
real; an operation with tensors of both devices is refused in CUDA's words. Single numbers of the CPU may take part, as
they may with CUDA. Registering lasts as long as the process, so tests do it in processes of their own (`worlds.run_world`).
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"
_MOVES = ("aten::_to_copy", "aten::copy_")


class Elsewhere(Tensor):
    """A tensor on the other device; `here` has its numbers, in memory that its views share."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    here: Tensor

    def __new__(cls, here: Tensor) -> "Elsewhere":
        made = Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=f"{NAME}:0",
        )  # fmt: skip
        made.here = here
        return made

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: "Elsewhere") -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.here = value.here

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, *args, **(kwargs or {}))


class _Stream:
    """There is one, and nothing on it is ever behind."""

    def synchronize(self) -> None:
        return

    def wait_stream(self, other: "_Stream") -> None:
        return


class _Module(_DummyBackendModule):
    """`torch.elsewhere`: what torch.distributed.checkpoint asks of a device."""

    _only = _Stream()

    def current_stream(self) -> _Stream:
        return self._only

    def stream(self, stream: _Stream) -> AbstractContextManager[None]:
        return nullcontext()


def other_device() -> torch.device:
    """Register it in this process."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_run, "PrivateUse1")
    # `torch.tensor(..., device=...)` copies in a mode in which torch 2.13 finds no Python fallback.
    aten.impl("copy_", partial(_run, torch.ops.aten.copy_.default), "PrivateUse1")
    _KEPT.extend((every, aten))
    return torch.device(NAME, 0)


_KEPT: list[torch.library.Library] = []
"""A library unregisters when it is collected."""


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
    moves = op._schema.name in _MOVES
    if not moves and (mixed := {t.device.type for t in tensors if t.dim() or isinstance(t, Elsewhere)} - {NAME}):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and "
            f"{', '.join(mixed)}! (in {op})"
        )
    stays = _device_of(kwargs.get("device"), tensors) == NAME
    known = {id(each.here): each for each in tensors if isinstance(each, Elsewhere)}
    out = op(*tree_map(_here, args), **tree_map(_here, kwargs))
    return tree_map(lambda each: _there(each, known) if stays else each, out)


def _device_of(asked: Any, tensors: list[Tensor]) -> str:
    """Where a result lies: where it was asked for, else where the first argument is."""
    return torch.device(asked).type if asked is not None else tensors[0].device.type if tensors else NAME


def _here(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.here if isinstance(value, Elsewhere) else value


def _there(value: Any, known: dict[int, "Elsewhere"]) -> Any:
    if not isinstance(value, Tensor):
        return value
    return known[id(value)] if id(value) in known else Elsewhere(value)
