"""Is the planner's first answer the best one? Against playing every plan that fits, on random settings.

    python benchmarks/first_answers.py [--settings 111] [--seed 0]

Settings are those of `random_settings.py`: up to 64 ranks on levels of 1 to 400 Gbit/s, models that may not fit on a rank,
so that pipelines compete on slow links; settings without a choice (nothing or one plan fits) or with more than MOST plans
are skipped. A first answer's loss is its simulated step over the shortest one of all plans that fit.
"""

import argparse
import statistics
import time
from itertools import count

from random_settings import random_setting

from thinwire.errors import PlanError
from thinwire.planner.choose import choose
from thinwire.planner.space import Space, cores, partitions
from thinwire.predict.candidate import Candidate, Setting
from thinwire.predict.peak_memory import peak_memory
from thinwire.predict.placement import Axes, place
from thinwire.predict.simulate import simulate_step

SPACE = Space(codecs="none", max_tensor=4, max_micro_batch=4, min_tokens=512)
MOST = 600
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
    losses, pipelines, plans, searched_s = [], 0, 0, 0.0
    for seed in count(given.seed):
        if len(losses) == given.settings:
            break
        setting = random_setting(seed)
        every = everything(setting)
        if not 1 < len(every) <= MOST:
            continue
        begun = time.process_time()
        first = choose(setting, SPACE, outer="never").best
        searched_s += time.process_time() - begun
        best = min(played_s(setting, *each) for each in every)
        losses.append(played_s(setting, first.candidate, first.axes) / best - 1)
        pipelines += first.candidate.pipeline > 1
        plans += len(every)
        if losses[-1] > 0.2:
            print(f"seed {seed}: {losses[-1] + 1:.2f} times the best of {len(every)}", flush=True)
    slow, twice = sum(loss > 0.2 for loss in losses), sum(loss >= 1.0 for loss in losses)
    print(f"{len(losses)} settings, {plans} plans played; {pipelines} first answers are pipelines")
    print(f"first answers over 20% slower than the best: {slow}; at least twice as slow: {twice}")
    print(
        f"slower at all (by 0.01%): {sum(loss > 1e-4 for loss in losses)}; worst {max(losses) + 1:.3f} times the best"
    )
    print(f"mean loss {statistics.fmean(losses):.2%}; search took {searched_s:.1f} s")


if __name__ == "__main__":
    main()
