"""thinwire: train language models where the network, not the chips, is the bottleneck.

The names below are the library's public surface; torch is imported when the first of them that needs it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thinwire.cluster.cluster import Cluster
    from thinwire.comm.world import World
    from thinwire.parallel.shard.engine import Sharded, shard
    from thinwire.parallel.shard.optimizer import ShardedOptimizer
    from thinwire.plan.partition import Partition
    from thinwire.plan.plan import Plan, PlanConfig
    from thinwire.plan.sync import Sync, SyncConfig
    from thinwire.planner.choose import plan_for, simulate_plan
    from thinwire.sync.outer_sync import OuterSync

__version__ = "0.1.0"

__all__ = [
    "Cluster",
    "OuterSync",
    "Partition",
    "Plan",
    "PlanConfig",
    "Sharded",
    "ShardedOptimizer",
    "Sync",
    "SyncConfig",
    "World",
    "plan_for",
    "shard",
    "simulate_plan",
]

_HOMES = {
    "Cluster": "thinwire.cluster.cluster",
    "OuterSync": "thinwire.sync.outer_sync",
    "Partition": "thinwire.plan.partition",
    "Plan": "thinwire.plan.plan",
    "PlanConfig": "thinwire.plan.plan",
    "Sharded": "thinwire.parallel.shard.engine",
    "ShardedOptimizer": "thinwire.parallel.shard.optimizer",
    "Sync": "thinwire.plan.sync",
    "SyncConfig": "thinwire.plan.sync",
    "World": "thinwire.comm.world",
    "plan_for": "thinwire.planner.choose",
    "shard": "thinwire.parallel.shard.engine",
    "simulate_plan": "thinwire.planner.choose",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'thinwire' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
