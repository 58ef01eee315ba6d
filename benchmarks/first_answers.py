"""Is the planner's first answer the best one? Against playing every plan that fits, on random settings.

    python benchmarks/first_answers.py [--settings 111] [--seed 0]

Every second setting is any of `random_settings.py`, the others are models that do not fit on a rank behind links of 1 to
100 Gbit/s, where pipelines compete; settings without a choice (nothing or one plan fits) or with more than MOST plans are
skipped. A first answer's loss is its simulated step over the shortest one of all plans that fit. Told of `choose`, which
prints the table, and of `search` for one plan alone, which flips, why-not, `simulate` and `-o` ask.
"""

import argparse
import statistics
import time
from itertools import count

from random_settings import random_setting, slow_pipeline

from thinwire.errors import PlanError
from thinwire.planner.choose import choose
from thinwire.planner.search import search
from thinwire.planner.space import Space, cores, partitions
from thinwire.predict.candidate import Candidate, Setting
from thinwire.predict.peak_memory import peak_memory
from thinwire.predict.placement import Axes, place
from thinwire.predict.simulate import simulate_step

SPACE = Space(codecs="none", max_tensor=4, max_micro_batch=2, min_tokens=1024)
MOST = 400
"""Plans of a setting, so that all can be played."""


def everything(setting: Setting) -> list[tuple[Candidate, Axes]]:
    """Every plan of the space that fits, up to one more than MOST."""
    found: list[tuple[Candidate, Axes]] = []
    capacity = setting.cluster.device.memory_bytes
    assert capacity
    for core in cores(setting, SPACE):
        try:
            axes = place(core, setting.cluster, setting.calibration)
        except PlanError:
            continue
        for each in partitions(setting, SPACE, core, axes):
            if peak_memory(setting, each, axes).fits(capacity):
                found.append((each, axes))
                if len(found) > MOST:
                    return found
    return found


def played_s(setting: Setting, candidate: Candidate, axes: Axes) -> float:
    return simulate_step(setting, candidate, axes, keep_spans=False).step_s


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--settings", type=int, default=111)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    losses: dict[str, list[float]] = {"choose": [], "search": []}
    pipelines, plans, settings, searched_s = 0, 0, 0, 0.0
    for seed in count(given.seed):
        if settings == given.settings:
            break
        setting = slow_pipeline(seed) if seed % 2 else random_setting(seed)
        every = everything(setting)
        if not 1 < len(every) <= MOST:
            continue
        begun = time.process_time()
        answers = {"choose": choose(setting, SPACE, outer="never").best}
        searched_s += time.process_time() - begun
        answers["search"] = search(setting, SPACE, keep=1).best[0]
        best = min(played_s(setting, *each) for each in every)
        for name, answer in answers.items():
            losses[name].append(played_s(setting, answer.candidate, answer.axes) / best - 1)
            if losses[name][-1] > 0.2:
                print(f"seed {seed}, {name}: {losses[name][-1] + 1:.2f} times the best of {len(every)}", flush=True)
        pipelines += answers["choose"].candidate.pipeline > 1
        plans, settings = plans + len(every), settings + 1
    print(f"{settings} settings, {plans} plans played; {pipelines} first answers are pipelines")
    for name, found in losses.items():
        over = [sum(loss > limit for loss in found) for limit in (1e-4, 0.2, 1.0)]
        print(
            f"{name}: slower than the best by over 0.01%: {over[0]}, by over 20%: {over[1]}, over twice as slow: {over[2]}; "
            f"worst {max(found) + 1:.3f} times the best, mean {statistics.fmean(found):.2%} over it"
        )
    print(f"choosing took {searched_s:.1f} s")


if __name__ == "__main__":
    main()
