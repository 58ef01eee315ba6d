"""Modules on the meta device, which have shapes and no numbers: a unit's first values are made when its buffer is.

So no rank ever holds the full model: at most what it keeps of it, and one unit.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from thinwire.errors import UseError

Initial = Callable[[str], Tensor]
"""The first values of the parameter of this name."""


class FirstValues:
    """Where the first values of a module's parameters come from: what they hold, or `initial` for those on meta.

    The latter become parameters on `device` that take no memory yet; tied ones stay tied. Raises UseError for
    parameters on meta without `initial`, and for buffers there, whose values nobody knows.
    """

    def __init__(self, module: nn.Module, initial: Initial | None, device: torch.device) -> None:
        self._initial = initial
        self._deferred = {name for name, parameter in module.named_parameters() if parameter.is_meta}
        for name, buffer in module.named_buffers():
            if buffer.is_meta:
                raise UseError(f"buffer {name} is on the meta device; give it its values before shard()")
        if self._deferred and initial is None:
            raise UseError(
                f"{min(self._deferred)} is on the meta device; give shard() `initial`, which makes its values"
            )
        _make_hollow(module, device)

    def of(self, name: str, parameter: nn.Parameter) -> Tensor:
        """The first values of a parameter. Raises UseError if `initial` makes another shape."""
        if name not in self._deferred:
            return parameter.detach()
        assert self._initial is not None
        made = self._initial(name)
        if made.shape != parameter.shape:
            raise UseError(f"`initial` made {tuple(made.shape)} for {name}, which is {tuple(parameter.shape)}")
        return made.detach()


def _make_hollow(module: nn.Module, device: torch.device) -> None:
    """Replace parameters on meta by ones of the same shape on `device`: one NaN, seen in every place."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for inner in module.modules():
        for key, parameter in list(inner.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta:
                if parameter not in made:
                    fill = math.nan if parameter.is_floating_point() or parameter.is_complex() else 0
                    nowhere = torch.full((), fill, device=device).to(parameter.dtype).expand(parameter.shape)
                    made[parameter] = nn.Parameter(nowhere, requires_grad=parameter.requires_grad)
                setattr(inner, key, made[parameter])
