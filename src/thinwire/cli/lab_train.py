"""A training run on a lab: checked before anything is built, then `thinwire train` as every rank."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from thinwire.errors import ConfigError

if TYPE_CHECKING:
    from thinwire.cluster.cluster import Cluster
    from thinwire.lab.config import LabConfig
    from thinwire.train.job import Job


@dataclass(frozen=True)
class Training:
    """A run that fits a lab."""

    run_file: Path
    settings: list[str]
    job: "Job"

    @staticmethod
    def check(run_file: Path, settings: list[str], config: "LabConfig") -> "Training":
        """Read and resolve the run file (its corpus is prepared on first use). Raises what `thinwire train` raises, and
        ConfigError if its levels are not the lab's hosts and ranks."""
        from thinwire.train.job import read_config, resolve

        run = read_config(run_file, settings)
        check_levels(run.cluster.resolve(run_file.parent), config)
        return Training(run_file, settings, resolve(run_file, run, prepare=True))

    @property
    def folder(self) -> Path:
        return self.job.folder

    @property
    def events(self) -> Path:
        from thinwire.train.folder import EVENTS_FILE

        return self.job.folder / EVENTS_FILE

    def begin(self, *, fresh: bool) -> list[str]:
        """Make or re-open the run folder; the command of every rank. Raises ConfigError."""
        from thinwire.train.folder import open_folder

        open_folder(self.job, fresh=fresh).lock.release()  # rank 0 opens it again, and holds it
        overrides = [word for setting in self.settings for word in ("--set", setting)]
        start = [sys.executable, "-c", "from thinwire.cli import main; main()"]
        return [*start, "train", str(self.run_file), *overrides]


def check_levels(cluster: "Cluster", config: "LabConfig") -> None:
    """Raise ConfigError unless the run's ranks are the lab's and no level crosses the edge of a host or a site."""
    ends = {cluster.ranks_within(index) for index in range(-1, len(cluster.levels))}
    edges = {"host": config.ranks_per_host, "lab": config.ranks}
    if config.hosts_per_site is not None:
        edges["site"] = config.hosts_per_site * config.ranks_per_host
    if cluster.ranks == config.ranks and all(edge in ends for edge in edges.values()):
        return
    levels = " x ".join(f"{level.name}={level.fanout}" for level in cluster.levels)
    inner = [config.ranks_per_host, config.hosts_per_site or config.hosts]
    fitting = [*inner, config.sites] if config.sites else inner
    named = ", ".join(
        f"{{name='{name}', fanout={fanout}}}"
        for name, fanout in zip(("node", "cluster", "site"), fitting, strict=False)
        if fanout > 1 or len(fitting) == 1
    )
    raise ConfigError(
        f"the run's levels {levels} make {cluster.ranks} ranks and do not fit {config.hosts} hosts x "
        f'{config.ranks_per_host} ranks; try --set "cluster.levels=[{named or "1"}]"'
    )
