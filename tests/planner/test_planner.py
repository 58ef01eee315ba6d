"""The search leaves nothing out, wrong wishes get a sentence, and the answer is a plan that the trainer reads."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from calibration_fit import Measured, fit, predict
from published import layered_rate
from random_settings import random_setting
from typer.testing import CliRunner

from thinwire.cli import app, main
from thinwire.cluster.cluster import Calibration, Cluster, Device, Level
from thinwire.cluster.hardware import CALIBRATIONS, calibration_of, device_preset
from thinwire.cluster.hardware import preset as cluster_preset
from thinwire.errors import ConfigError, PlanError, ThinwireError
from thinwire.model.presets import preset
from thinwire.plan.plan import Plan
from thinwire.planner.choose import choose
from thinwire.planner.explain import document, mfu, report
from thinwire.planner.search import Choice, cost, search
from thinwire.planner.sensitivity import SHARES, flips, needed, with_rate
from thinwire.planner.space import Space, cores, partitions
from thinwire.planner.whynot import parse, why_not
from thinwire.predict.candidate import Candidate, CandidateSync, Setting
from thinwire.predict.outer_cost import rate_for_utilisation
from thinwire.predict.peak_memory import peak_memory
from thinwire.predict.placement import place, touch_s
from thinwire.predict.simulate import simulate_step
from thinwire.units import divisors

EXAMPLES = Path(__file__).parents[2] / "examples"


def setting(
    *fanouts: int, model: str = "llama-2-7b", sequences: int = 64, rate: float = 2e10, tokens: int = 2048
) -> Setting:
    names = ("node", "cluster", "site")
    levels = [Level(name=names[i], fanout=n, bytes_per_s=rate / 8**i, latency_s=1e-5) for i, n in enumerate(fanouts)]
    return Setting(preset(model), Cluster(device=device_preset("a100-80g"), levels=tuple(levels)), sequences, tokens)


@pytest.mark.parametrize(
    "seed", [7, 22, 28, 30, *(pytest.param(each, marks=pytest.mark.slow) for each in (10, 11, 45))]
)
def test_the_first_answer_is_the_fastest_of_all_that_fit(seed: int) -> None:
    """Plain enumeration simulates them all: settings by chance, pipelines on slow links among them."""
    given, space = random_setting(seed), Space(max_tensor=4, max_micro_batch=2, codecs="none")
    capacity = given.cluster.device.memory_bytes
    assert capacity
    every: dict[Candidate, float] = {}
    for core in cores(given, space):
        try:
            axes = place(core, given.cluster, given.calibration)
        except PlanError:
            continue
        fitting = [
            each for each in partitions(given, space, core, axes) if peak_memory(given, each, axes).fits(capacity)
        ]
        every |= {each: simulate_step(given, each, axes, keep_spans=False).step_s for each in fitting}
    found = search(given, space, keep=10)
    assert found.proven and found.best[0].time.total == pytest.approx(min(every.values()), rel=1e-12)
    for ranked in found.best:
        assert ranked.time.total == pytest.approx(every[ranked.candidate], rel=1e-12)
    for hopeful in found.rest:
        assert found.best[0].time.total <= hopeful.least_s <= every[hopeful.candidate] * (1 + 1e-9)
    assert found.simulated <= found.fitting <= len(every)


def test_a_search_that_comes_to_its_limit_says_so() -> None:
    given = random_setting(10)
    found = search(given, Space(max_tensor=4, max_micro_batch=2, codecs="none"), most_units=0)
    assert found.simulated == 1 and not found.proven
    told = report(Choice(found, None), given, top=3)
    assert any("another plan may be faster than plan 1" in line for line in told)
    assert document(Choice(found, None), given, top=3)["proven"] is False


def test_every_answer_fits_divides_and_places() -> None:
    given = setting(8, 4, model="llama-2-13b", sequences=128)
    found = search(given, Space())
    for ranked in found.best:
        assert ranked.memory.total * 1.05 <= 80 * 2**30
        assert ranked.candidate.accumulate(given) >= 1
        assert ranked.candidate.data(given.cluster) * ranked.candidate.tensor * ranked.candidate.context > 0
        again = cost(given, ranked.candidate)
        assert again.time.total == pytest.approx(ranked.time.total)
        assert 0 < mfu(given, ranked.time.total) < 1


def test_runnable_plans_are_plans_the_trainer_reads() -> None:
    given = setting(8, 2, sequences=64)
    best = search(given, Space(runnable=True)).best
    assert best
    for ranked in best:
        assert ranked.candidate.runnable
        plan = ranked.candidate.to_plan(given)
        assert Plan.model_validate_json(plan.model_dump_json()) == plan
        assert plan.micro_batch * plan.accumulate * 16 == 64


def test_a_faster_link_never_makes_the_best_plan_slower() -> None:
    given = setting(4, 4, sequences=64)
    steps = [
        search(with_rate(given, 1, rate), Space(), keep=1).best[0].time.total for rate in (1e7, 1e8, 1e9, 1e10, 1e12)
    ]
    assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize("seed", [16, 28, 32])
def test_more_bandwidth_is_never_slower(seed: int) -> None:
    """Of the best plan, at every level: settings by chance, 1 to 400 Gbit/s."""
    given, space = random_setting(seed), Space(max_tensor=4, max_micro_batch=2, codecs="none")
    for index, level in enumerate(given.cluster.levels):
        assert level.bytes_per_s
        best = [search(with_rate(given, index, level.bytes_per_s * by), space, keep=1) for by in (0.3, 1.0, 1.1, 4.0)]
        seconds = [found.best[0].time.total for found in best]
        assert all(after <= before * (1 + 1e-9) for before, after in pairwise(seconds)), (index, seconds)


def test_what_the_user_fixes_stays() -> None:
    given = setting(8, 2, sequences=64)
    found = search(given, Space(fixed=parse("tensor=4,recompute=full,partition=zero1", given)))
    assert found.best
    for ranked in found.best:
        assert (ranked.candidate.tensor, ranked.candidate.recompute) == (4, "full")
        assert ranked.candidate.depths == (-1, -1, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tensor=3", "tensor=3 does not divide the model's 32 heads; the nearest that does is tensor="),
        ("pipeline=5", "does not divide the cluster's 16 ranks; the nearest that does is pipeline=4"),
        ("pipeline=64", "does not divide|more stages"),
        ("context=7", "does not divide 2048 tokens"),
        ("tensor=0", "not a whole number above 0"),
        ("tensor=-2", "not a whole number above 0"),
        ("speed=9", "is no part of a plan"),
        ("partition=zero9", "is unknown"),
        ("recompute=half", "is unknown"),
    ],
)
def test_impossible_wishes_get_a_sentence(text: str, says: str) -> None:
    given = setting(8, 2, sequences=64)
    best = search(given, Space(), keep=1).best[0]
    with pytest.raises(PlanError, match=says):
        why_not(text, given, Space(), best)


def test_why_not_names_the_limit_and_the_change_that_mends_it() -> None:
    given = setting(8, 4, model="llama-2-70b", sequences=128)
    best = search(given, Space(), keep=1).best[0]
    large = why_not("tensor=1,pipeline=2,partition=ddp", given, Space(), best)
    assert "of 80.0 GiB at stage" in large
    assert "would fit" in large
    slow = why_not("tensor=32", given, Space(), best)
    assert "slower by" in slow
    assert "crosses level 'cluster'" in slow
    assert "does not run tensor yet" in slow
    change = large.rsplit("; ", 1)[1].split(" would fit")[0].split(", ")
    fields = ["tensor=1", "pipeline=2", "partition=ddp"]
    kept = [field for field in fields if field.split("=")[0] not in {item.split("=")[0] for item in change}]
    assert search(given, Space(fixed=parse(",".join(kept + change), given)), keep=1).best


def test_a_model_that_fits_nowhere_gets_the_smallest_change() -> None:
    given = setting(2, 2, model="llama-3-70b", sequences=16)
    with pytest.raises(PlanError, match=r"no plan fits: .* of 80.0 GiB .*; cluster = (\d+) \((\d+) ranks\) would fit"):
        choose(given, Space())


def test_a_batch_that_divides_nothing_is_said() -> None:
    given = setting(8, 4, sequences=3)
    with pytest.raises(
        PlanError, match=r"no data-parallel plans divide 3 sequences .* over 32 ranks; try batch\.sequences = 32"
    ):
        search(given, Space(runnable=True))
    with pytest.raises(PlanError, match=r"try batch\.sequences = 32"):
        cost(given, Candidate())


def test_missing_figures_are_said() -> None:
    given = setting(2)
    bare = Cluster(device=Device(), levels=given.cluster.levels)
    with pytest.raises(ConfigError, match="has no peak_flops_per_s, which planning needs"):
        search(Setting(given.spec, bare, 16, 2048), Space())


def test_outer_synchronisation_is_offered_only_where_links_are_slow() -> None:
    fast, slow = setting(4, 2, rate=3e11), setting(4, 2, rate=3e11)
    slow = with_rate(slow, 1, 6e7)
    assert choose(fast, Space()).outer is None
    answer = choose(slow, Space())
    assert answer.outer is not None
    assert answer.best.candidate.sync is not None
    assert answer.best.time.total < answer.every_step.best[0].time.total / 4
    assert answer.best.time.outer_s <= 0.051 * answer.best.time.total
    assert choose(slow, Space(), outer="never").outer is None


def test_flips_really_flip_and_needed_rates_rise_with_the_share() -> None:
    given = setting(4, 4, model="llama-2-13b", sequences=64, rate=4e11)
    best = search(given, Space(), keep=1).best[0]
    for flip in flips(given, Space(), best, factor=16.0, halvings=2):
        at = with_rate(given, given.cluster.index(flip.level), flip.bytes_per_s)
        there = search(at, Space(), keep=1).best[0]
        assert there.candidate == flip.other.candidate
    for row in needed(given, best):
        rates = [rate for rate in row.bytes_per_s if rate is not None]
        assert rates == sorted(rates)
        assert len(row.bytes_per_s) == len(SHARES)


def test_streaming_needs_less_than_diloco_needs_less_than_every_step() -> None:
    def rate(sync: CandidateSync | None) -> float:
        return layered_rate(0.9, parameters=1e9, layers=24, groups=2, step_s=0.1, sync=sync)

    whole, parts, coded = (
        rate(CandidateSync(0, 100)),
        rate(CandidateSync(0, 100, 8, 1)),
        rate(CandidateSync(0, 100, 8, 1, "e3m0")),
    )
    assert rate(None) > 10 * whole > 10 * parts > 30 * coded
    plain = rate_for_utilisation(0.9, parameters=1e9, groups=2, step_s=0.1, sync=CandidateSync(0, 100))
    assert whole <= plain  # the plain formula hides nothing behind the last backward


def test_fit_finds_the_constants_that_made_the_rows() -> None:
    truth = Calibration(matmul_efficiency=0.5, outer_link_efficiency=0.4)
    rows = []
    for depths in [(-1, -1, 1), (1, 1, 1), (0, 0, 1)]:
        for micro_batch in (1, 4):
            base = setting(8, 4, sequences=128, rate=2e10)
            row = Measured(base, Candidate(micro_batch=micro_batch, depths=depths), 1.0)
            rows.append(Measured(base, row.candidate, predict(row, truth)))
    fitted = fit(rows, Calibration(), ["matmul_efficiency", "outer_link_efficiency"], iterations=80)
    assert fitted.matmul_efficiency == pytest.approx(0.5, rel=0.03)
    assert fitted.outer_link_efficiency == pytest.approx(0.4, rel=0.03)
    assert max(abs(predict(row, fitted) / row.seconds - 1) for row in rows) < 0.03


def test_a_cluster_carries_its_calibration_and_presets_say_their_source() -> None:
    cluster = cluster_preset("dgx-a100-4")
    assert calibration_of(cluster) == CALIBRATIONS["a100-80g"]
    own = cluster.model_copy(update={"calibration": Calibration(matmul_efficiency=0.4, origin="measured")})
    assert calibration_of(own).matmul_efficiency == 0.4
    unknown = cluster.model_copy(update={"device": Device(name="own")})
    assert "nothing is known of device 'own'" in calibration_of(unknown).source
    assert touch_s(1e9, setting(2)) > 0


@pytest.mark.parametrize("name", ["llama-70b-on-10g", "frontier-20b", "three-sites-10b"])
def test_the_examples_are_planned(name: str) -> None:
    result = CliRunner().invoke(app, ["plan", str(EXAMPLES / f"{name}.toml"), "--json", "--outer", "never"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    assert answer["plans"]
    first = answer["plans"][0]
    assert first["memory_bytes"] * 1.05 <= 80 * 2**30
    assert first["step_s"] == pytest.approx(sum(v for k, v in first["seconds"].items() if k != "hidden_s"))


def test_the_command_explains_itself_and_writes_a_plan(tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        '[model]\npreset = "llama-2-7b"\n[batch]\nsequences = 64\ntokens = 2048\n[cluster]\npreset = "dgx-a100-4"\n'
    )
    out = tmp_path / "plan.json"
    arguments = ["plan", str(run_file), "--top", "3", "--why-not", "tensor=16", "-o", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "efficiencies default (ten A100 runs" in result.output
    assert "why not tensor=16: slower by" in result.output
    assert "memory at stage 0" in result.output
    plan = Plan.model_validate_json(out.read_text())
    assert plan.levels == (("node", 8), ("cluster", 4))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[cluster]\npreset = "frontier"\n', "did you mean"),
        ('[cluster]\nlevels = [2]\ndevice = "h100"\n', "level 'node' has no bytes_per_s"),
        (
            '[cluster]\ndevice = "h100"\nlevels = [{name = "node", fanout = 2, bytes_per_s = -1}]\n',
            "finite, non-negative",
        ),
        ('[cluster]\nfile = "c.toml"\n', "version 9; this thinwire reads version 1"),
        ("[batch]\nsequences = 0\n", "greater than or equal to 1"),
        ('[model]\npreset = "llama-2-7"\n', "did you mean 'llama-2-7b'"),
        ("[cluster]\nlevels = [2]\n", "device 'cpu' has no peak_flops_per_s"),
    ],
)
def test_wrong_files_are_one_sentence_and_exit_2(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text("version = 9\n")
    run_file = tmp_path / "run.toml"
    run_file.write_text(text)
    with pytest.raises((SystemExit, ThinwireError)) as caught:
        main(["plan", str(run_file)])
    assert getattr(caught.value, "code", 2) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error


def test_divisors_are_all_of_them() -> None:
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
