"""The frozen decision. Names that `thinwire.plan` had while it was one file are found here for one more release."""

import importlib
import warnings
from typing import Any

_MOVED = {
    **dict.fromkeys(
        ("Partition", "Plan", "PlanConfig", "Wire", "read_plan", "resolve_partition"), "thinwire.plan.plan"
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module 'thinwire.plan' has no attribute {name!r}")
    warnings.warn(f"thinwire.plan.{name} is {_MOVED[name]}.{name} now", FutureWarning, stacklevel=2)
    return getattr(importlib.import_module(_MOVED[name]), name)
