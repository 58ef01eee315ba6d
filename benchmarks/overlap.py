"""How much of the wire's time is behind compute: each plan beside its twin that waits for every collective at once.

Two emulated hosts of two ranks, as in `thin_network.py`. At most the lesser of compute and wire can be hidden: compute is
the step without any network, the wire what waiting adds to it; the share is what overlapping saves of that.

    OMP_NUM_THREADS=1 python benchmarks/overlap.py --rates 1000 300 100 --rounds 2
"""

import argparse

import thin_network
from rich.console import Console
from rich.table import Table
from sides import NO_NETWORK, WAITING


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rates", nargs="+", default=["1000", "300", "100"], help="Mbit/s")
    arguments.add_argument("--rounds", default="2")
    arguments.add_argument("--steps", default="6", help="at each rate in a round")
    given = arguments.parse_args()
    plans = [name.removesuffix(", waiting") for name in WAITING]
    sides = [NO_NETWORK, *(side for plan in plans for side in (plan, f"{plan}, waiting"))]
    words = ["--rates", *given.rates, "--rounds", given.rounds, "--steps", given.steps, "--sides", *sides]
    options = thin_network.parse([*words, "--inner-steps", "4", "--loss-steps", "8"])
    seen = thin_network.measure(options, lambda _: None)
    rows = {row["side"]: row for row in thin_network.summary(seen, options)}
    failed = [f"{side}: {row['error']}" for side, row in rows.items() if row["error"]]
    if failed:
        raise SystemExit("\n".join(failed))
    compute_s = rows[NO_NETWORK]["rates"]["unlimited"]["step_s"]
    table = Table("plan", "link", "no network", "waiting", "overlapped", "hidden of what can be")
    for plan in plans:
        for rate in options.rates:
            link = thin_network.rate_name(rate)
            waiting_s, overlapped_s = (rows[side]["rates"][link]["step_s"] for side in (f"{plan}, waiting", plan))
            hidden = (waiting_s - overlapped_s) / min(compute_s, waiting_s - compute_s)
            seconds = [f"{s:.2f} s" for s in (compute_s, waiting_s, overlapped_s)]
            table.add_row(plan, link, *seconds, f"{hidden:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
