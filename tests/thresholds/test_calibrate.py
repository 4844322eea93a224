"""Thresholds from data: quantiles, intervals and regressions against brute force, the command, and the callback."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import yaml

from capo_rl import CAPOConfig
from capo_rl.cli import main
from capo_rl.curvature.selection import Thresholds, select
from capo_rl.curvature.shifts import Shifts
from capo_rl.curvature.step import AdamStep, SGDStep
from capo_rl.planning.planner import Planner
from capo_rl.testbed.bench import read_bench
from capo_rl.thresholds.adapt import AdaptThresholds
from capo_rl.thresholds.choice import (
    CalibrationError,
    Choice,
    Step,
    choose_for_kl,
    choose_for_rate,
    fisher_bound,
)
from capo_rl.thresholds.kl_regression import regress, student_quantile
from capo_rl.thresholds.rejection_rate import bootstrap, factors_at, interval, rejected, scaled, severity
from capo_rl.trainers.calibrate import calibrate, fragment
from capo_rl.trainers.watching import at_scale
from conftest import ROOT, make_model

QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
SHORT = ["--dataset_limit", "64", "--max_steps", "20"]


# ---- bounds for a rate ----------------------------------------------------------------------------------------------


def slow_factors(severities: np.ndarray, rate: float) -> np.ndarray:
    """Try every share q that each criterion might reject, from the largest down."""
    n = severities.shape[1]
    for q in range(n, -1, -1):
        factors = []
        for row in severities:
            # the smallest bound that rejects at most q tokens
            factors.append(min(bound for bound in row if (row > bound).sum() <= q))
        factors = np.array(factors)
        if (severities > factors[:, None]).any(0).sum() <= rate * n + 1e-9:
            return factors
    raise AssertionError


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("ties", [False, True])
def test_bounds_for_a_rate_equal_those_found_by_trying_all(seed, ties):
    generator = np.random.default_rng(seed)
    severities = generator.lognormal(size=(generator.integers(1, 4), 40))
    if ties:
        severities = np.ceil(3 * severities) / 3
    for rate in (0.01, 0.05, 0.1, 0.333, 0.8):
        fast, slow = factors_at(severities, rate), slow_factors(severities, rate)
        np.testing.assert_array_equal(severities > fast[:, None], severities > slow[:, None])
        assert rejected(severities, fast) <= rate + 1e-9


def test_the_selection_rejects_what_was_asked_for():
    generator = np.random.default_rng(0)
    m_f, m_h = generator.lognormal(-9, 3, 2000), generator.normal(0, 1e-2, 2000)
    start = Thresholds(1e-4, (-1e-2, 2e-2))
    chosen = scaled(start, factors_at(severity(m_f, m_h, start), 0.05))
    assert chosen.hessian[1] == pytest.approx(-2 * chosen.hessian[0])
    zero = torch.zeros(2000)
    shifts = Shifts(torch.tensor(m_h), torch.tensor(m_f), zero, zero, zero)
    assert 0.049 <= 1 - select(shifts, chosen).double().mean() <= 0.05
    by_m_f, by_m_h = m_f > chosen.fisher, (m_h < chosen.hessian[0]) | (m_h > chosen.hessian[1])
    assert abs(int(by_m_f.sum()) - int(by_m_h.sum())) <= 1  # each criterion alone rejects as many as the other


def test_open_sides_stay_open():
    m_f, m_h = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    assert severity(m_f, m_h, Thresholds(math.inf, (None, 1.0))).tolist() == [[3.0, -4.0]]
    assert scaled(Thresholds(math.inf, (None, 1.0)), np.array([5.0])) == Thresholds(math.inf, (None, 5.0))
    assert scaled(Thresholds(2.0, None), np.array([5.0])) == Thresholds(10.0, (None, None))
    with pytest.raises(ValueError, match="no bound to move"):
        severity(m_f, m_h, Thresholds(None, None))
    with pytest.raises(ValueError, match=r"capo_hessian_low=0\.5 can't be multiplied: give a number below 0, or null"):
        severity(m_f, m_h, Thresholds(None, (0.5, None)))


def made_steps(generator: np.random.Generator, count: int, tokens: int = 200) -> list[np.ndarray]:
    """Steps whose tokens share a scale."""
    return [generator.lognormal(generator.normal(0, 0.5), 1.0, size=(1, tokens)) for _ in range(count)]


def test_the_bootstrap_over_steps_covers_the_truth():
    """60 times 20 steps; the bootstrap of tokens, which forgets that they share a step, does not."""
    generator = np.random.default_rng(1)
    many = made_steps(generator, 4000)
    truth = float(np.quantile(np.concatenate(many, axis=1), 0.95))
    covered = {"steps": 0, "tokens": 0, "rate": 0}
    for _ in range(60):
        steps = made_steps(generator, 20)
        factors, rates = bootstrap(steps, 0.05, resamples=100)
        low, high = interval(factors[:, 0], len(steps))
        covered["steps"] += low <= truth <= high
        pooled = np.concatenate(steps, axis=1)[0]
        of_tokens = [np.quantile(generator.choice(pooled, len(pooled)), 0.95) for _ in range(100)]
        low, high = np.quantile(of_tokens, (0.025, 0.975))
        covered["tokens"] += low <= truth <= high
        # the rate that these bounds have on all other steps
        rate = rejected(np.concatenate(many[:500], axis=1), factors_at(pooled[None], 0.05))
        low, high = np.quantile(rates, (0.025, 0.975))
        covered["rate"] += low <= rate <= high
    assert covered["steps"] >= 0.85 * 60
    assert covered["rate"] >= 0.85 * 60
    assert covered["tokens"] <= 0.7 * 60


def test_the_bootstrap_is_the_same_each_time_and_refuses_few_steps():
    steps = made_steps(np.random.default_rng(0), 6)
    for one, other in zip(bootstrap(steps, 0.1, 20), bootstrap(steps, 0.1, 20), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match="5 steps count: intervals of 95 % need six; raise --steps"):
        bootstrap(steps[:5], 0.1)


# ---- KL on m_F ------------------------------------------------------------------------------------------------------


def test_regressions_are_least_squares():
    generator = np.random.default_rng(0)
    x = generator.normal(-8, 1, 12)
    y = 3 + 0.8 * x + generator.normal(0, 0.3, 12)
    free, one = regress(np.exp(x), np.exp(y)), regress(np.exp(x), np.exp(y), slope=1.0)
    slope, intercept = np.polyfit(x, y, 1)
    assert (free.slope, free.intercept) == (pytest.approx(slope), pytest.approx(intercept))
    residual = y - slope * x - intercept
    assert free.spread == pytest.approx(math.sqrt(residual @ residual / 10))
    assert free.r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    assert one.intercept == pytest.approx((y - x).mean())
    assert one.r2 < free.r2
    assert one.kl(one.shift_for(1e-3)) * one.margin() == pytest.approx(1e-3)


def test_three_updates_are_too_few_and_lost_ones_do_not_count():
    with pytest.raises(ValueError, match="3 updates with a shift and a KL: a regression needs four"):
        regress([1.0, 2.0, 3.0, 0.0, 4.0], [1.0, 2.0, 3.0, 1.0, math.nan])
    with pytest.raises(ValueError, match="every update has the same shift"):
        regress([2.0] * 4, [1.0, 2.0, 3.0, 4.0])


def test_the_prediction_limit_holds_nineteen_times_of_twenty():
    generator = np.random.default_rng(0)
    below = 0
    for _ in range(2000):
        x, noise = generator.normal(0, 1, 7), generator.normal(0, 0.7, 7)
        line = regress(np.exp(x[:6]), np.exp(x[:6] + noise[:6]), slope=1.0)
        below += math.exp(x[6] + noise[6]) <= line.kl(math.exp(x[6])) * line.margin()
    assert 0.935 <= below / 2000 <= 0.965


@pytest.mark.parametrize(("degrees", "value"), [(3, 2.3534), (5, 2.0150), (10, 1.8125), (49, 1.6766)])
def test_students_quantiles_are_those_of_the_tables(degrees, value):
    assert student_quantile(0.95, degrees) == pytest.approx(value, rel=4e-3)


def slow_bound(steps: list[Step], batch_m_f: float) -> float:
    def holds(bound: float) -> bool:
        for step in steps:
            kept = step.m_f[step.m_f <= bound]
            if len(kept) and step.batch_m_f * kept.mean() / step.m_f.mean() > batch_m_f:
                return False
        return True

    if holds(math.inf):
        return math.inf
    return max((m_f for step in steps for m_f in step.m_f if holds(m_f)), default=0.0)


def watched(generator: np.random.Generator, count: int = 8, worth: float = 50.0, noise: float = 0.1) -> list[Step]:
    """Steps whose KL is `worth` times their batch m_F, up to noise."""
    steps = []
    for _ in range(count):
        m_f = generator.lognormal(generator.normal(-9, 1), 2, 100)
        batch = 0.1 * float(m_f.mean())
        m_h = generator.normal(0, 1e-2, 100)
        steps.append(Step(m_f, m_h, batch, worth * batch * math.exp(generator.normal(0, noise))))
    return steps


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_on_m_f_equals_the_one_found_by_trying_all(seed):
    steps = watched(np.random.default_rng(seed), 4)
    # a bound between two tokens' m_F decides as the lower of them
    for batch_m_f in np.geomspace(1e-7, 1e-2, 8):
        fast, slow = fisher_bound(steps, batch_m_f), slow_bound(steps, batch_m_f)
        for step in steps:
            np.testing.assert_array_equal(step.m_f <= fast, step.m_f <= slow)


def test_a_target_in_nats_becomes_a_bound_where_m_f_explains_kl():
    steps = watched(np.random.default_rng(0))
    target = float(np.median([step.kl for step in steps])) / 5
    choice = choose_for_kl(steps, target)
    assert choice.budget is None
    assert choice.thresholds.hessian == (None, None)
    low, high = choice.intervals["capo_fisher_threshold"]
    assert low <= choice.thresholds.fisher <= high
    # the remaining tokens, by the law that made the steps, keep below the target
    for step in steps:
        kept = step.m_f[step.m_f <= choice.thresholds.fisher]
        assert 50 * step.batch_m_f * kept.mean() / step.m_f.mean() <= target
    assert choose_for_kl(steps, 1e3).thresholds.fisher == math.inf


def test_where_m_f_says_nothing_of_kl_a_budget_is_recommended():
    generator = np.random.default_rng(0)
    steps = [Step(s.m_f, s.m_h, s.batch_m_f, 1e-3 * generator.lognormal()) for s in watched(generator)]
    choice = choose_for_kl(steps, 3e-4)
    assert choice.budget == 3e-4
    assert "m_F explains too little of KL" in choice.remarks[-1]
    fields = yaml.safe_load(fragment(choice, []))
    config = CAPOConfig(output_dir="x", report_to="none", bf16=False, use_cpu=True, **fields)
    assert (config.kl_budget, config.capo_mode) == (3e-4, "trust_region")


def test_a_target_that_no_bound_holds_is_said():
    with pytest.raises(CalibrationError, match=r"--kl-nats 1e-30: a bound would have to be 0"):
        choose_for_kl(watched(np.random.default_rng(0)), 1e-30)


def test_more_than_all_tokens_with_a_shift_cannot_be_rejected():
    steps = [Step(s.m_f * (s.m_f > 1e-4), s.m_h * 0, s.batch_m_f, s.kl) for s in watched(np.random.default_rng(0))]
    with pytest.raises(CalibrationError, match="a bound would have to be 0, since only"):
        choose_for_rate(steps, Thresholds(), 0.9)


def test_a_fragment_is_yaml_that_a_config_takes():
    choice = choose_for_rate(watched(np.random.default_rng(0)), Thresholds(), 0.1)
    text = fragment(choice, ["capo calibrate x"])
    config = CAPOConfig(output_dir="x", report_to="none", bf16=False, use_cpu=True, **yaml.safe_load(text))
    assert config.thresholds.fisher == pytest.approx(choice.thresholds.fisher, rel=1e-3)
    assert config.thresholds.hessian == pytest.approx(choice.thresholds.hessian, rel=1e-3)
    assert text.startswith("# capo calibrate x\n")
    assert "null" in fragment(Choice(Thresholds(1e-3, (None, math.inf)), {}), [])


@pytest.mark.parametrize("step", [SGDStep(0.01), AdamStep(0.01)], ids=["sgd", "adam"])
@pytest.mark.parametrize("fisher", ["sampled", "expected"])
def test_shifts_at_another_learning_rate_are_those_the_planner_finds_there(step, fisher):
    generator = torch.Generator().manual_seed(0)
    hidden, logits = torch.randn(30, 8, generator=generator), torch.randn(30, 20, generator=generator)
    actions, advantages = torch.randint(20, (30,), generator=generator), torch.randn(30, generator=generator)

    def plan(lr: float, learn: bool):
        step.lr = lr
        planner = Planner(step, Thresholds(), top_k=None, fisher=fisher)
        planned = planner.plan(hidden, logits, actions, advantages)
        if learn:
            planned.weights = advantages / 30
            planner.commit()
        return planned

    plan(0.01, learn=True)  # Adam's moments are not empty
    small, large = plan(0.01, learn=False), plan(0.04, learn=False)
    m_f, m_h = at_scale([small], 4.0, fisher)
    np.testing.assert_allclose(m_f, large.shifts.m_f, rtol=1e-5)
    np.testing.assert_allclose(m_h, large.shifts.m_h, rtol=1e-4, atol=1e-7)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_the_same_thresholds_each_time(tmp_path, capsys):
    out, again = tmp_path / "a.yaml", tmp_path / "b.yaml"
    run = tmp_path / "run"
    assert main(["calibrate", QUICKSTART, *SHORT, "--out", str(out), "--output_dir", str(run)]) == 0
    printed, log = capsys.readouterr()
    assert [line.split(",")[0] for line in log.splitlines() if "step" in line] == [
        f"calibrate: step {step} of 7" for step in range(1, 8)
    ]
    text = out.read_text()
    assert text in printed
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not run.exists()  # nothing is left where the run itself will go
    fields = yaml.safe_load(text)
    assert set(fields) == {"capo_fisher_threshold", "capo_hessian_low", "capo_hessian_high"}
    assert fields["capo_hessian_low"] == -fields["capo_hessian_high"]
    assert "from 6 of 20 steps" in text
    done = calibrate(QUICKSTART, [*SHORT, "--output_dir", str(run)], rejection_rate=0.05, out=str(again))
    assert done.text == again.read_text() == text
    assert done.watching > 0 < done.choosing
    assert "s of training steps" in printed


def test_a_target_in_nats_from_the_command_line(tmp_path):
    out = tmp_path / "a.yaml"
    assert main(["calibrate", QUICKSTART, "--kl-nats", "3e-4", *SHORT, "--out", str(out)]) == 0
    fields = yaml.safe_load(out.read_text())
    if "capo_kl_budget" in fields:  # where m_F says too little
        assert fields == {"capo_mode": "trust_region", "capo_kl_budget": 3e-4}
    else:
        assert fields["capo_fisher_threshold"] > 0 and fields["capo_hessian_low"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--capo_mode", "off", "--capo_kl_budget", "null"], "capo_mode: off looks at no token"),
        (["--capo_granularity", "sequence"], "give --capo_granularity token"),
        (["--rejection-rate", "5"], "--rejection-rate 5.0 is a share of the tokens"),
        (["--kl-nats", "-1"], "--kl-nats -1.0 must be above 0"),
        (["--steps", "99"], "--steps 99: thresholds take at least 7, and the run has 20; give 7 to 20"),
        (["--steps", "4"], "--steps 4: thresholds take at least 7, and the run has 20; give 7 to 20"),
        (["--steps", "6", "--capo_step", "auto"], "--steps 6: thresholds take at least 7, and the run has 20"),
        (["--steps", "5", "--capo_step", "auto", "--optim", "sgd"], "--steps 5: thresholds take at least 6, and the"),
        (["--max_steps", "3"], "the run has 3 steps, and thresholds take at least 7: give a larger --max_steps"),
        (["--max_steps", "3", "--steps", "3"], "the run has 3 steps, and thresholds take at least 7"),
        (
            ["--max_completion_length", "1"],
            "every shift in 7 steps is 0: all completions of a group got the same reward",
        ),
        (
            ["--capo_fisher_threshold", "null", "--capo_hessian_low", "null", "--capo_hessian_high", "null"],
            "no bound to move",
        ),
        (["--learnig_rate", "1"], "did you mean `learning_rate`?"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_calibrated_is_said(tmp_path, capsys, options, message):
    assert main(["calibrate", QUICKSTART, *SHORT, *options, "--out", str(tmp_path / "a.yaml")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.yaml").exists()


def test_other_commands_still_refuse_what_they_do_not_know(capsys):
    with pytest.raises(SystemExit):
        main(["report", "x", "--nothing"])
    assert "unrecognized arguments: --nothing" in capsys.readouterr().err


def test_the_bench_has_the_thresholds_that_were_found():
    arms = read_bench(ROOT / "experiments" / "calibrated.yaml").arms
    found = sorted((ROOT / "results" / "calibrated" / "thresholds").glob("*.yaml"))
    assert len(found) == 7
    for path in found:
        optimizer, _, target = path.stem.partition("-")
        name = "3e-4 nats" if target == "kl" else f"{target} %"
        arm = arms[f"{ {'sgd': 'SGD', 'adam': 'Adam'}[optimizer] }, {name}"]
        fields = yaml.safe_load(path.read_text())
        assert {field: arm[field] for field in fields} == fields


# ---- the callback ---------------------------------------------------------------------------------------------------


def adapting(build, rate: float = 0.2, **settings):
    trainer = build(**({"capo_mode": "mask"} | settings))
    trainer.add_callback(AdaptThresholds(trainer, rejection_rate=rate))
    return trainer


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_adapting_reaches_the_rate_from_bounds_far_off(build):
    """From bounds that reject nothing, and from bounds that reject almost all."""
    for start in (1e-3, 5e-6):
        settings = {"capo_fisher_threshold": start, "capo_hessian_low": None, "capo_hessian_high": None}
        trainer = adapting(build, capo_mode="monitor", max_steps=60, learning_rate=1e-3, **settings)
        trainer.train()
        rates = logged(trainer, "capo/rejection_rate")
        assert abs(rates[1] - 0.2) > 0.15
        assert 0.15 <= np.mean(rates[30:]) <= 0.25


def test_adapting_is_bounded_and_logged(build):
    trainer = adapting(build, max_steps=40, capo_fisher_threshold=1e9, capo_hessian_low=-1e9, capo_hessian_high=None)
    trainer.train()
    fisher, hessian = (np.array(logged(trainer, f"capo/thresholds/{name}")) for name in ("fisher", "hessian"))
    assert len(fisher) == 40
    assert fisher[0] == 1e9
    assert hessian[0] == -1e9  # the side that is not open
    ratio = fisher[1:] / fisher[:-1]
    assert (ratio >= 0.5 - 1e-9).all()
    assert ratio[0] == pytest.approx(0.5)
    assert fisher[-1] == pytest.approx(1e7)  # a hundredth, and no less
    assert trainer.planner.thresholds.hessian[1] is None


def test_adapting_goes_on_from_a_checkpoint(build, tmp_path):
    settings = {"capo_fisher_threshold": 1e-2, "max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    whole = adapting(build, **settings)
    whole.train()
    resumed = adapting(build, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.planner.thresholds == whole.planner.thresholds
    assert whole.planner.thresholds.fisher != 1e-2
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_without_shifts_nothing_adapts(build):
    trainer = adapting(build, max_steps=2, learning_rate=0.0)
    trainer.train()
    assert trainer.planner.thresholds == Thresholds()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capo_mode": "off"}, "capo_mode='off' looks at no token"),
        ({"capo_granularity": "batch"}, "capo_granularity='batch' judges subsets"),
        ({"restore_callback_states_from_checkpoint": True}, "this one reads its checkpoint by itself"),
        ({"rate": 1.0}, "rejection_rate=1.0 is a share of the tokens"),
    ],
    ids=str,
)
def test_runs_that_cannot_be_adapted(build, settings, message):
    with pytest.raises(ValueError, match=message):
        adapting(build, model=make_model(), **settings)
