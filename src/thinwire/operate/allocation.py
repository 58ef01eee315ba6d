"""From the levels of a run to nodes and ranks per node, and back when the number of nodes is given. No torch.

Names and options become what schedulers accept, or are refused with a sentence.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from thinwire.cluster.cluster import Cluster
from thinwire.config import show_text
from thinwire.errors import ConfigError
from thinwire.train.job import read_config
from thinwire.units import whole_number

_MOST_NODES = 100_000


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
    first, _, last = text.partition("-")
    fewest, most = (whole_number(part, most=_MOST_NODES) for part in (first, last or first))
    if not fewest or not most or most < fewest:
        raise ConfigError(
            f"--nodes {text[:40]} is no number of nodes (at most {_MOST_NODES:,}); write 4, or 2-4 for whatever the "
            f"scheduler can give"
        )
    return fewest, most


_OURS = re.compile(r"RANK|WORLD_SIZE|LOCAL_RANK|PET_.*|SLURM_.*")
"""Variables in which a launcher tells each rank its place."""


def job_name(text: str) -> str:
    """`text` as a DNS label. Raises ConfigError if nothing of it is one."""
    name = re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")[:50].rstrip("-")
    if not name or not name[0].isalpha():
        raise ConfigError(
            f"{show_text(text)} makes no name for a job (letters, digits, dashes, a letter first); give --name"
        )
    return name


def volume_claim(text: str) -> tuple[str, str]:
    """`NAME:/PATH` as its two parts. Raises ConfigError."""
    name, colon, path = one_line("--claim", text).partition(":")
    if not colon or not name or not path.startswith("/"):
        raise ConfigError(f"--claim {text} is not of the form NAME:/PATH")
    return name, path


def memory(text: str) -> str:
    """A size as sbatch takes it: `64G`. Raises ConfigError."""
    if re.fullmatch(r"[0-9]{1,9}[KMGTkmgt]?", text) is None:
        raise ConfigError(f"--mem {text} is no size; write for example 64G, or 0 for all of a node's memory")
    return text


def variables(given: Iterable[str]) -> dict[str, str]:
    """`NAME=VALUE` each. Raises ConfigError for what is none, or is a launcher's own."""
    found = {}
    for text in given:
        name, equals, value = one_line("--env", text).partition("=")
        if not equals or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
            raise ConfigError(f"--env {text} is not of the form NAME=VALUE")
        if _OURS.fullmatch(name):
            raise ConfigError(
                f"--env {text}: {name} is set by the launcher, which tells each rank its place; leave it out"
            )
        found[name] = value
    return found


def one_line(what: str, text: str) -> str:
    """`text`, which becomes (part of) one line of a script. Raises ConfigError if it is empty or has more lines."""
    if not text.strip():
        raise ConfigError(f"{what} is empty; leave it out, or say something")
    if any(ord(letter) < 32 or letter in "\x7f\x85\u2028\u2029" for letter in text):
        raise ConfigError(
            f"{what} {show_text(text)} has a line break or another control character; write it in one line"
        )
    return text
