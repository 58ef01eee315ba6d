"""`[cluster]` of a run file: which levels there are and what a rank computes on, as a user says it. No torch."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from thinwire.cluster.cluster import Cluster, Device, Level, read_cluster
from thinwire.cluster.hardware import DEVICES, device_preset, found_device, found_gpus, preset
from thinwire.config import Frozen, build
from thinwire.errors import ConfigError


class ClusterConfig(Frozen):
    """`[cluster]` of a run file: a preset, a cluster file, or levels spelled out; and `device`."""

    preset: str | None = None
    file: str | None = None
    device: Device | str | None = None
    """A preset's name, alone or as `name` of a table with figures over the preset's; a table with a `kind` of its own;
    "cuda": the GPU that this machine has. Default: that of the preset or file; with levels what this machine has."""
    levels: tuple[Level, ...] = ()
    interface: str | None = Field(default=None, min_length=1)
    share_device: bool = False

    @field_validator("levels", mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        """`[2, 4]` is short for two levels named `node` and `cluster` (one number: `node`)."""
        if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
            names = ["node", "cluster"] if len(value) <= 2 else [f"level{i}" for i in range(len(value))]
            return [{"name": name, "fanout": fanout} for name, fanout in zip(names, value, strict=False)]
        return value

    @field_validator("device", mode="before")
    @classmethod
    def _over_preset(cls, value: Any) -> Any:
        """A table that names a preset means it; one without `kind` has to."""
        if not isinstance(value, dict) or not isinstance(value.get("name", ""), str):
            return value
        name = value.get("name") or ("cuda" if value.get("kind") == "cuda" else "cpu")
        if name in DEVICES:
            known = DEVICES[name]
            if value.get("kind", known.kind) != known.kind:
                raise ValueError(
                    f"the device {name!r} is of kind {known.kind!r}, not {value['kind']!r}; leave kind out"
                )
            figures = {"origin": "given", **value} if value.keys() - {"name", "kind"} else value
            return {**known.model_dump(), **figures}
        if "kind" in value:
            return {**value, "name": name}
        try:
            return device_preset(name)
        except ConfigError as error:
            raise ValueError(f"{error} (for one of your own give kind = 'cuda' or 'cpu' and its figures too)") from None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [name for name in ("preset", "file", "levels") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"give one of preset, file and levels, not {' and '.join(given)}")
        return self

    def resolve(self, base: Path = Path(), *, gpus: Sequence[str] | None = None) -> Cluster:
        """The cluster this section means; `file` is relative to `base`. Raises ConfigError.

        `gpus`: names of those that this machine has; None: they are looked for where they matter.
        """
        if self.preset:
            cluster = preset(self.preset)
        elif self.file:
            cluster = read_cluster(base / self.file)
        else:
            levels = self.levels or (Level(name="node", fanout=1),)
            cluster = build(Cluster, {"device": self._device(gpus), "levels": levels}, "cluster")
        device = self._device(gpus) if self.device is not None else cluster.device
        if self.share_device and device.kind == "cpu":
            raise ConfigError("cluster.share_device is for accelerators, and the device is a CPU; leave it out")
        given: dict[str, Any] = {"device": device, "share_device": self.share_device or cluster.share_device}
        if self.interface:
            given["interface"] = self.interface
        return cluster.model_copy(update=given)

    def _device(self, gpus: Sequence[str] | None) -> Device:
        if isinstance(self.device, Device):
            return self.device
        if self.device not in (None, "cuda"):
            return device_preset(self.device)
        found = found_device(found_gpus(os.environ) if gpus is None else gpus)
        return Device(name="cuda", kind="cuda") if self.device and found.kind == "cpu" else found
