"""The frozen decision. Names that `thinwire.plan` had while it was one file are found here for one more release."""

import importlib
import warnings
from typing import Any

_MOVED = {
    "Partition": ("thinwire.plan.partition", "Partition"),
    "Plan": ("thinwire.plan.plan", "Plan"),
    "PlanConfig": ("thinwire.plan.plan", "PlanConfig"),
    "Wire": ("thinwire.plan.compression", "Compression"),
    "read_plan": ("thinwire.plan.plan", "read_plan"),
    "resolve_partition": ("thinwire.plan.partition", "resolve_partition"),
}
_PUBLIC = ("Partition", "Plan", "PlanConfig")


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module 'thinwire.plan' has no attribute {name!r}")
    home, now = _MOVED[name]
    shown = "thinwire" if name in _PUBLIC else home
    warnings.warn(f"thinwire.plan.{name} is {shown}.{now} now", FutureWarning, stacklevel=2)
    return getattr(importlib.import_module(home), now)
