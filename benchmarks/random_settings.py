"""Settings and candidates of many kinds, from a seed: what properties of predictions are checked on."""

import random
from collections.abc import Iterator
from dataclasses import replace

from thinwire.cluster.cluster import Calibration, Cluster, Level
from thinwire.cluster.hardware import device_preset
from thinwire.errors import PlanError
from thinwire.model.spec import ModelSpec
from thinwire.planner.space import Space, cores, partitions
from thinwire.predict.candidate import THINWIRE, Candidate, CandidateSync, Setting
from thinwire.predict.placement import Axes, place

GBIT = 1.25e8


def random_setting(seed: int) -> Setting:
    """Up to 64 ranks on one to three levels of 1 to 400 Gbit/s, a model of 2 to 13 blocks that may not
    fit on a rank, and a runtime."""
    rng = random.Random(seed)
    fanouts = [rng.choice([1, 2, 4, 8]) for _ in range(rng.choice([1, 2, 2, 3]))]
    while len(fanouts) > 1 and _product(fanouts) > 64:
        fanouts.pop()
    levels = tuple(
        Level(
            name=("node", "cluster", "site")[index],
            fanout=fanout,
            bytes_per_s=GBIT * 10 ** rng.uniform(0, 2.6),
            latency_s=rng.choice([0.0, 1e-5, 1e-3, 3e-2]),
            behind=rng.choice([1.0, 1.0, 1.0, 0.0, 0.6]),
        )
        for index, fanout in enumerate(fanouts)
    )
    hidden, heads = rng.choice([(256, 4), (1024, 8), (4096, 32)])
    spec = ModelSpec(
        vocab_size=rng.choice([512, 32000]), hidden=hidden, layers=rng.randint(2, 13), heads=heads, kv_heads=heads,
        head_size=hidden // heads, ffn=4 * hidden, max_tokens=4096, tied=rng.random() < 0.4,
    )  # fmt: skip
    framework = replace(
        THINWIRE, prefetch=rng.random() < 0.8, overlap_reduce=rng.random() < 0.8, overlap_refresh=rng.random() < 0.8,
        broadcast_refresh=rng.random() < 0.2,
    )  # fmt: skip
    calibration = Calibration(
        overlap_slowdown=rng.choice([0.0, 0.1, 0.5]), collective_s=rng.choice([0.0, 1e-3]), meeting_s=rng.choice([0.0, 1e-3])
    )  # fmt: skip
    ranks = _product(fanouts)
    memory = 3 * 2**30 + rng.choice([0.15, 0.4, 2.0]) * 18 * spec.parameters
    device = device_preset(rng.choice(["a100-80g", "h100"])).model_copy(update={"memory_bytes": memory})
    cluster = Cluster(device=device, levels=levels)
    sequences = ranks * rng.choice([1, 2, 3, 8, 16])
    return Setting(spec, cluster, sequences, rng.choice([512, 2048]), framework, calibration)


def slow_pipeline(seed: int) -> Setting:
    """4 to 16 ranks behind links of 1 to 100 Gbit/s, and a model of 8 to 24 blocks whose states do not fit on a rank."""
    rng = random.Random(seed)
    fanouts = rng.choice([(4,), (8,), (16,), (2, 4), (2, 8), (4, 2), (4, 4)])
    levels = tuple(
        Level(
            name=("node", "cluster")[index],
            fanout=fanout,
            bytes_per_s=GBIT * 10 ** rng.uniform(0, 2),
            latency_s=rng.choice([1e-5, 1e-4]),
        )
        for index, fanout in enumerate(fanouts)
    )
    hidden = rng.choice([1024, 2048, 4096])
    spec = ModelSpec(
        vocab_size=rng.choice([4096, 32000]), hidden=hidden, layers=rng.randint(8, 24), heads=16, kv_heads=16,
        head_size=hidden // 16, ffn=4 * hidden, max_tokens=4096, tied=rng.random() < 0.3,
    )  # fmt: skip
    memory = 3 * 2**30 + rng.choice([0.2, 0.4, 0.8]) * 18 * spec.parameters
    device = device_preset("a100-80g").model_copy(update={"memory_bytes": memory})
    cluster = Cluster(device=device, levels=levels)
    return Setting(spec, cluster, cluster.ranks * rng.choice([1, 2, 4, 8]), rng.choice([1024, 2048]))


def _product(numbers: list[int]) -> int:
    found = 1
    for number in numbers:
        found *= number
    return found


def random_candidates(setting: Setting, seed: int, many: int) -> Iterator[tuple[Candidate, Axes]]:
    """Points of the space with their axes: a core by chance, of it a partition by chance; a tenth of them with rounds."""
    rng = random.Random(seed)
    space = Space(min_tokens=128, max_micro_batch=8)
    spaces = [space]
    if len(setting.cluster.levels) > 1 and setting.cluster.levels[-1].fanout > 1:
        rounds = CandidateSync(len(setting.cluster.levels) - 1, 8, rng.choice([1, 4]), rng.choice([0, 1, 5]))
        spaces.append(replace(space, sync=rounds))
    every = [list(cores(setting, each)) for each in spaces]
    for _ in range(many):
        core = rng.choice(every[-1 if rng.random() < 0.1 else 0])
        try:
            axes = place(core, setting.cluster, setting.calibration)
        except PlanError:
            continue
        yield rng.choice(list(partitions(setting, space, core, axes))), axes
