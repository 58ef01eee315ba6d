"""The frozen decision. Names that `thinwire.plan` had while it was one file are found here for one more release."""

import importlib
import warnings
from typing import Any

_MOVED = {
    "Partition": "thinwire.plan.partition",
    "Plan": "thinwire.plan.plan",
    "PlanConfig": "thinwire.plan.plan",
    "Wire": "thinwire.plan.compression",
    "read_plan": "thinwire.plan.plan",
    "resolve_partition": "thinwire.plan.partition",
}
_PUBLIC = ("Partition", "Plan", "PlanConfig")


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module 'thinwire.plan' has no attribute {name!r}")
    home = "thinwire" if name in _PUBLIC else _MOVED[name]
    warnings.warn(f"thinwire.plan.{name} is {home}.{name} now", FutureWarning, stacklevel=2)
    return getattr(importlib.import_module(_MOVED[name]), name)
