"""Parameters that are used where nobody gathers them: outside their unit's forward, between steps, by a method of a child.

While a parameter's numbers are not here, or not new yet, it is of a subclass whose `__torch_function__` asks its unit for
them first; whatever is done with it then is done with the right numbers. As soon as they are here it is a plain parameter
again: what computes never pays for this, and `torch.compile` never sees it.

Hooks on a module that stay behind when it is copied or pickled, and that `torch.compile` leaves alone.

A copy of a sharded module (an EMA, a file) is a plain module: its forward must not drive the engine of the one it is
made from.

The module's own `state_dict` and `load_state_dict` under any sharding: they see full parameters, the newest ones.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Ask = Callable[[Sequence[Any], Callable[..., Any]], None]
"""Called with the units whose parameters are used, and by which function of torch."""

GET_GRAD: Callable[..., Any] = Tensor.grad.__get__  # type: ignore[union-attr]
_GET_DATA: Callable[..., Any] = getattr(Tensor, "data").__get__  # noqa: B009 - stubs know no descriptor
ALIASES = frozenset([_GET_DATA, Tensor.detach, torch.detach, copy.copy, copy.deepcopy])
"""What makes a tensor of a parameter's numbers that no graph goes through."""
_SETTERS = ("requires_grad", "grad")
_GETTERS = (
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn", "names", "itemsize", "nbytes",
    "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_mps", "is_xpu", "is_nested", "output_nr",
    "_version", "_backward_hooks", "_post_accumulate_grad_hooks", "retains_grad", "_grad_fn",
)  # fmt: skip
_METHODS = (
    "size", "dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "requires_grad_",
    "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "is_inference", "is_shared", "get_device",
    "ndimension", "__len__",
)  # fmt: skip
_NO_NUMBERS = frozenset(
    [getattr(Tensor, name).__get__ for name in _GETTERS if hasattr(Tensor, name)]
    + [getattr(Tensor, name).__set__ for name in _SETTERS]
    + [getattr(Tensor, name) for name in _METHODS]
    + [torch.is_floating_point, torch.is_complex, torch.numel]
)
"""What can be asked of a parameter whose numbers are not here."""


class Watched(nn.Parameter):
    """Made by `watched`; never constructed."""

    unit: ClassVar[Any]
    plain: ClassVar[type[nn.Parameter]]
    ask: ClassVar[Ask]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _NO_NUMBERS:
            asks: dict[Ask, dict[Any, None]] = {}
            for parameter in _watched_in((args, kwargs)):
                kind = type(parameter)
                asks.setdefault(kind.ask, {})[kind.unit] = None
            for ask, units in asks.items():
                ask(list(units), func)
        if next(_watched_in((args, kwargs)), None) is None:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():  # still watched for something else than what this reads
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        type(self).ask([type(self).unit], copy.deepcopy)
        with plainly(self):
            return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        type(self).ask([type(self).unit], copy.copy)
        with plainly(self):
            return self.__reduce_ex__(protocol)


class plainly:  # noqa: N801 - reads as a statement
    """Inside, a parameter is of its own class, whatever is watched."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter, self._kind = parameter, type(parameter)

    def __enter__(self) -> None:
        if issubclass(self._kind, Watched):
            self._parameter.__class__ = self._kind.plain

    def __exit__(self, *error: object) -> None:
        self._parameter.__class__ = self._kind


def watched(plain: type[nn.Parameter], unit: Any, ask: Ask) -> type[Watched]:
    """The subclass of `plain` for the parameters of `unit`; `ask` makes their numbers be here."""
    bases = (Watched,) if plain is nn.Parameter else (Watched, plain)
    return type(plain.__name__, bases, {"unit": unit, "plain": plain, "ask": staticmethod(ask)})


def _watched_in(item: Any) -> Iterator[Watched]:
    if issubclass(type(item), Watched):
        yield item
    elif isinstance(item, list | tuple):
        for each in item:
            yield from _watched_in(each)
    elif isinstance(item, dict):
        yield from _watched_in(list(item.values()))


def nothing(*_: Any, **__: Any) -> None:
    """What a hook is in a copy."""


def _nothing() -> Callable[..., None]:
    return nothing


class Hook:
    """`act`, run in eager mode."""

    def __init__(self, act: Callable[..., Any]) -> None:
        self._act = torch._disable_dynamo(partial(act))  # a part of its own: torch keeps what it makes of it there

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._act(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return nothing

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _nothing, ()


def hook_state_dict(module: nn.Module, full: Callable[[], AbstractContextManager[None]]) -> None:
    """Run both inside `full()`, which all ranks enter together."""
    entered = ExitStack()

    def enter(*_: Any) -> None:
        entered.enter_context(full())

    def leave(*_: Any) -> None:
        entered.close()

    for register, hook in (
        (module.register_state_dict_pre_hook, enter),
        (module.register_state_dict_post_hook, leave),
        (module.register_load_state_dict_pre_hook, enter),
        (module.register_load_state_dict_post_hook, leave),
    ):
        register(Hook(hook))  # type: ignore[no-untyped-call]
