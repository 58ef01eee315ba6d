"""From a run file to everything a run needs to know before it starts. No torch: wrong input is answered at once."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from thinwire.cluster.cluster import Cluster
from thinwire.config import load
from thinwire.data.corpus import Corpus
from thinwire.errors import ConfigError, DataError
from thinwire.hub.init import Init, read_init
from thinwire.hub.native_spec import AnySpec, NativeSpec
from thinwire.model.config import check_vocabulary
from thinwire.model.spec import ModelSpec
from thinwire.plan import Plan
from thinwire.rounds.config import Sync
from thinwire.rounds.fragments import deal, fragment_count
from thinwire.train.config import RunConfig


@dataclass(frozen=True)
class Job:
    """A resolved run file: what will be trained, on what, where, how."""

    config: RunConfig
    folder: Path
    cluster: Cluster
    plan: Plan
    spec: AnySpec
    corpus: Corpus
    init: Init | None = None
    """Where the first weights come from; None: they are drawn."""


def read_config(run_file: Path, settings: Sequence[str] = ()) -> RunConfig:
    """The run file with its overrides. Raises ConfigError."""
    return load(RunConfig, run_file, settings)


def resolve(run_file: Path, config: RunConfig, *, prepare: bool = False) -> Job:
    """Check every section against every other. Raises ConfigError, DataError or PlanError with one sentence.

    `prepare`: make the corpus first if it is not there, once everything has been checked that does not need it.
    """
    cluster = config.cluster.resolve(run_file.parent)
    try:
        micro_batch, accumulate = config.batch.split(cluster.ranks)
    except ValueError as error:
        raise ConfigError(f"{run_file}: {error}") from None
    plan = config.plan.resolve(cluster, micro_batch=micro_batch, accumulate=accumulate)
    if prepare:
        corpus_for(config)
    corpus = Corpus.open(config.data)
    folder = config.run.folder or Path("runs") / run_file.stem
    init = None if config.model.init is None else read_init(config.model.init, kept=folder)
    spec = init.spec if init is not None else _spec(config, corpus, folder)
    if init is not None or config.model.hf is not None:
        check_vocabulary(spec.vocab_size, corpus.vocab_size, "prepare the corpus with the tokenizer.json of that model")
    _check_lengths(run_file, config, spec, corpus)
    if plan.sync is not None and isinstance(spec, ModelSpec):
        _check_rounds(plan.sync, spec)
    return Job(config, folder, cluster, plan, spec, corpus, init)


def _check_rounds(sync: Sync, spec: ModelSpec) -> None:
    """Raises PlanError if the model has fewer units, or a round fewer steps, than fragments are asked for."""
    shapes = spec.parameter_shapes()
    units = [(unit.name, sum(math.prod(shapes[name]) for name in unit.parameters)) for unit in spec.units()]
    fragments = fragment_count(sync.fragments, spec.layers)
    deal(units, fragments, sync.order)
    sync.schedule(fragments)


def _spec(config: RunConfig, corpus: Corpus, folder: Path) -> AnySpec:
    if config.model.hf is None:
        return config.model.resolve(corpus.vocab_size)
    from thinwire.hub.native import describe

    return describe(config.model.hf, kept=folder, lora=config.model.lora)


def _check_lengths(run_file: Path, config: RunConfig, spec: AnySpec, corpus: Corpus) -> None:
    if config.batch.tokens > spec.max_tokens:
        raise ConfigError(
            f"{run_file}: batch.tokens = {config.batch.tokens} is longer than the model's {spec.max_tokens} positions; "
            f"lower batch.tokens or set model.max_tokens = {config.batch.tokens}"
        )
    if corpus.train.tokens <= config.batch.tokens:
        raise DataError(
            f"the corpus at {config.data.path} has {corpus.train.tokens:,} training tokens, fewer than one sequence of "
            f"{config.batch.tokens}; prepare more text or lower batch.tokens"
        )


def refuse_crossing(job: Job) -> None:
    """Raise ConfigError if documents are to be kept apart and the model of `[model] hf` lets them see each other.

    It is tried once, at the start, with the weights that training starts from; the model is in memory meanwhile.
    """
    talks = job.corpus.train.answers is not None
    if not isinstance(job.spec, NativeSpec) or (job.config.data.cross_documents and not talks):
        return
    from thinwire.hub import crossing
    from thinwire.hub.native import build_native

    model = build_native(job.spec, job.config.model.hf, seed=job.config.run.seed)
    crossing.refuse_crossing(model, job.spec.vocab_size, source=str(job.config.model.hf), talks=talks)


def crowding(ranks: int) -> str | None:
    """A warning if `ranks` local ranks have to share this machine's cores, else None."""
    cores = os.cpu_count() or 1
    if ranks <= cores:
        return None
    return f"{ranks} ranks share {cores} cores of this machine: they will take turns, and timings mean little"


def corpus_for(config: RunConfig) -> None:
    """Prepare `data.path` from `data.sources` if nothing is there yet. Raises DataError."""
    from thinwire.data.corpus import exists
    from thinwire.data.prepare import Options
    from thinwire.data.progress import prepare_shown

    data = config.data
    if not data.sources or exists(data):
        return
    options = Options(data.sources, data.tokenizer, data.include, data.exclude, data.field, data.heldout_fraction)
    prepare_shown(options, data.path)
