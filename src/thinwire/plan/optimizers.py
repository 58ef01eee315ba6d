"""`[optimizer]`: which optimizer makes weights out of gradients, by name, with the keys that torch gives it.

A name here is a builder in `train/assemble.py`, and a count of numbers that it keeps beside each weight, by which memory
is predicted. Whoever keeps a loop of their own gives `ShardedOptimizer` any elementwise class of torch.
"""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from thinwire.config import Frozen, nearest, show_text

_OWN_KEYS = {"adamw": ("beta1", "beta2", "eps"), "sgd": ("momentum", "nesterov")}
"""Optimizers by name, and the keys that one of them alone has."""
_SGD_WEIGHT_DECAY = 0.0
"""As torch.optim.SGD, which adds it to the gradient."""


class OptimizerConfig(Frozen):
    """`[optimizer]`: AdamW (arXiv 1711.05101) or SGD, and gradient clipping by global norm."""

    name: str = "adamw"
    """`adamw` or `sgd`."""
    lr: float = Field(default=1e-3, gt=0, le=1e6)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, ge=1e-30, le=1)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Of `sgd`, without dampening."""
    nesterov: bool = False
    """Of `sgd`: Nesterov's momentum."""
    weight_decay: float = Field(default=0.1, ge=0, le=1e6)
    """Applied to matrices; vectors (norms, biases) are not decayed. Default of `sgd`: 0."""
    clip_norm: float = Field(default=1.0, ge=0, le=1e30)
    """Largest global gradient norm; 0 switches clipping off."""

    @model_validator(mode="before")
    @classmethod
    def _of_the_named(cls, data: Any) -> Any:
        """Refuse what the named optimizer does not have; nothing that is given is ignored."""
        if not isinstance(data, Mapping):
            return data
        name = data.get("name", "adamw")
        if not isinstance(name, str):
            return data
        if name not in _OWN_KEYS:
            raise ValueError(f"name = {show_text(name)} is unknown{nearest(name, list(_OWN_KEYS))}")
        for other, keys in _OWN_KEYS.items():
            given = next((key for key in keys if key in data), None)
            if other != name and given is not None:
                raise ValueError(
                    f"{given} belongs to {other}, and the optimizer is {name}; leave it out, or set optimizer.name = "
                    f"'{other}'"
                )
        return {"weight_decay": _SGD_WEIGHT_DECAY, **data} if name == "sgd" else data

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError(
                "nesterov = true needs momentum above 0; set optimizer.momentum = 0.9, or leave nesterov out"
            )
        return self

    @model_serializer(mode="wrap")
    def _own_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the keys of other optimizers, so that what is written can be read."""
        foreign = {key for name, keys in _OWN_KEYS.items() if name != self.name for key in keys}
        return {key: value for key, value in dump(self).items() if key not in foreign}

    @property
    def state_numbers(self) -> int:
        """Numbers of optimizer state beside each trained weight, in the precision of the masters."""
        return 2 if self.name == "adamw" else int(self.momentum > 0)
