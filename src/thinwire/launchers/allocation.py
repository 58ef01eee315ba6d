"""From the levels of a run to nodes and ranks per node, and back when the number of nodes is given. No torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from thinwire.cluster.cluster import Cluster
from thinwire.errors import ConfigError
from thinwire.train.job import read_config


@dataclass(frozen=True)
class Allocation:
    """Between `fewest` and `most` nodes of `ranks_per_node` ranks. `from_nodes`: the run's levels follow their number."""

    fewest: int
    most: int
    ranks_per_node: int
    from_nodes: bool = False

    def levels(self, nodes: str) -> str:
        """The setting that makes the run's levels those of `nodes` nodes (a number, or a shell's word for it)."""
        return f"cluster.levels=[{self.ranks_per_node},{nodes}]"


def ranks_per_node_of(cluster: Cluster) -> int:
    """Ranks inside the level called `node`; without one, inside the outermost level but one, or all of a single level."""
    if "node" in cluster.level_names:
        return cluster.ranks_within(cluster.index("node"))
    return cluster.ranks_within(max(0, len(cluster.levels) - 2))


def allocate(run_file: Path, settings: Sequence[str], *, nodes: str | None, ranks_per_node: int | None) -> Allocation:
    """What to ask a scheduler for. Raises ConfigError if the ranks do not divide into nodes, or a count is no count."""
    config = read_config(run_file, settings)
    cluster = config.cluster.resolve(run_file.parent)
    per_node = ranks_per_node or ranks_per_node_of(cluster)
    if nodes is not None:
        fewest, most = _range(nodes)
        return Allocation(fewest, most, per_node, from_nodes=True)
    if cluster.ranks % per_node:
        raise ConfigError(
            f"the {cluster.ranks} ranks of {run_file} do not divide into nodes of {per_node}; change --ranks-per-node, or "
            f"give --nodes so that the levels follow"
        )
    return Allocation(cluster.ranks // per_node, cluster.ranks // per_node, per_node)


def _range(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    if found is None or int(found[1]) < 1 or int(found[2] or found[1]) < int(found[1]):
        raise ConfigError(
            f"--nodes {text[:40]} is no number of nodes; write 4, or 2-4 for whatever the scheduler can give"
        )
    return int(found[1]), int(found[2] or found[1])
