"""Statistics over seeds against brute force, and what counts as a collapse, a target reached, and a median."""

from __future__ import annotations

import itertools
import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capo_rl.statistics import (
    CompletionsToTarget,
    bootstrap_interval,
    collapsed,
    completions_to_target,
    interval_to_target,
    iqm,
    mean_and_error,
    paired_bootstrap,
    pass_at_k,
    probability_above_zero,
    reach,
    smooth,
    spearman,
    wilson_interval,
)

NAN, INF = float("nan"), float("inf")
SAMPLES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30)
# eighths at a weight of 1/2 make every average exact up to rounding far below the lines; None is a missing point
CURVES = st.lists(st.none() | st.integers(0, 8).map(lambda i: i / 8), max_size=25)


# Samples


@given(SAMPLES)
def test_mean_and_error_are_the_textbooks(values):
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    if len(values) == 1:
        assert math.isnan(error)
    else:
        assert error == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-9)


@given(SAMPLES)
def test_iqm_is_the_middle_half_of_the_values_repeated_four_times(values):
    n = len(values)
    assert iqm(values) == pytest.approx(statistics.fmean(sorted(4 * values)[n : 3 * n]), abs=1e-9)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7.0], 7.0),
        ([1.0, 2.0], 1.5),
        ([9.0, 0.0, 3.0], (0.25 * 0 + 3 + 0.25 * 9) / 1.5),
        ([5.0, 1.0, 2.0, 3.0, 4.0], 3.0),
        ([-1e6, 1.0, 2.0, 1e6], 1.5),
    ],
)
def test_iqm_of_known_values(values, expected):
    assert iqm(values) == pytest.approx(expected)


@pytest.mark.parametrize("function", [mean_and_error, iqm, lambda x: bootstrap_interval([x]), lambda x: spearman(x, x)])
@pytest.mark.parametrize("values", [[], [1.0, NAN], [1.0, INF], [1.0, None], [[1.0], [2.0]]])
def test_a_sample_that_is_not_all_there_is_refused(function, values):
    with pytest.raises(ValueError, match="finite numbers are needed, and at least one"):
        function(values)


# Intervals


@pytest.mark.parametrize(("seeds", "level", "expected"), [(5, 0.95, 0.84), (20, 0.95, 0.93), (20, 0.5, 0.48)])
def test_the_interval_covers_the_truth_as_often_as_documented(seeds, level, expected):
    """The expected figures are P(|t| < z √((n−1)/n)) with n − 1 degrees of freedom; 0.06 is 2 to 4 standard errors."""
    rng, trials = np.random.default_rng(0), 300
    hits = 0
    for trial in range(trials):
        low, high = bootstrap_interval([rng.normal(0.5, 0.1, seeds)], np.mean, level, resamples=150, seed=trial)
        hits += low <= 0.5 <= high
    assert hits / trials == pytest.approx(expected, abs=0.06)


def test_each_group_is_resampled_on_its_own():
    groups = [[0.0, 0.1], [100.0, 100.1, 100.2, 100.3]]
    low, high = bootstrap_interval(groups, np.mean, resamples=300)
    assert 66.6 < low < high < 66.9  # two of the one and four of the other in every draw
    low, high = bootstrap_interval([[*groups[0], *groups[1]]], np.mean, resamples=300)
    assert high - low > 50


@given(st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=5), min_size=1, max_size=3))
def test_the_interval_is_ordered_within_the_values_and_narrower_at_a_lower_level(groups):
    low, high = bootstrap_interval(groups, resamples=30)
    inner_low, inner_high = bootstrap_interval(groups, level=0.5, resamples=30)
    assert min(map(min, groups)) - 1e-12 <= low <= inner_low <= inner_high <= high <= max(map(max, groups)) + 1e-12


def test_the_interval_depends_on_the_seed_alone():
    rng = np.random.default_rng(1)
    groups = [rng.random(5), rng.random(7)]
    assert bootstrap_interval(groups, resamples=100) == bootstrap_interval(groups, resamples=100)
    assert bootstrap_interval(groups, resamples=100) != bootstrap_interval(groups, resamples=100, seed=1)


def test_one_seed_has_no_interval():
    assert all(map(math.isnan, bootstrap_interval([[0.5]])))
    assert all(map(math.isnan, bootstrap_interval([[0.5, 0.6], [0.7]])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": []}, "no groups"),
        ({"groups": [[1.0, 2.0]], "level": 1.0}, r"level=1\.0"),
        ({"groups": [[1.0, 2.0]], "level": NAN}, "level=nan"),
        ({"groups": [[1.0, 2.0]], "resamples": 0}, "resamples=0"),
    ],
)
def test_bad_intervals_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**arguments)


def test_pairing_removes_what_the_items_share():
    rng = np.random.default_rng(0)
    problem = rng.random(100)
    a, b = problem + 0.05 + 0.01 * rng.normal(size=100), problem
    difference, low, high = paired_bootstrap(a, b, resamples=300)
    assert difference == pytest.approx(np.mean(a) - np.mean(b))
    assert 0.04 < low < difference < high < 0.06
    assert paired_bootstrap(a, a, resamples=10) == (0.0, 0.0, 0.0)
    shuffled_low, shuffled_high = paired_bootstrap(a, b[::-1], resamples=300)[1:]
    assert shuffled_low < 0 < shuffled_high
    with pytest.raises(ValueError, match="2 values can't be paired with 1"):
        paired_bootstrap([1.0, 2.0], [1.0])


# Shares


@pytest.mark.parametrize(("n", "c"), [(n, c) for n in range(1, 7) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, c):
    for k in range(1, n + 1):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_does_not_overflow():
    assert pass_at_k(10_000, 1, 5_000) == 0.5


@pytest.mark.parametrize("arguments", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_of_impossible_counts_is_an_error(arguments):
    with pytest.raises(ValueError, match="k="):
        pass_at_k(*arguments)


@given(
    st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.5, 0.9, 0.95])
)
def test_wilson_interval_ends_where_the_score_test_rejects(counts, level):
    c, n = counts
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    low, high = wilson_interval(c / n, n, level)
    assert 0 <= low <= c / n <= high <= 1
    for end in (low, high):
        assert abs(c / n - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), abs=1e-9) or end in (0, 1)


def test_wilson_interval_covers_what_it_says():
    """Over all outcomes of 40 trials, by the binomial's weights; of averaged samples it may cover more."""
    for share in (0.05, 0.3, 0.5, 0.9):
        covered = 0.0
        for c in range(41):
            low, high = wilson_interval(c / 40, 40)
            covered += (low <= share <= high) * math.comb(40, c) * share**c * (1 - share) ** (40 - c)
        assert 0.92 < covered < 0.99


@pytest.mark.parametrize("arguments", [(1.1, 4), (-0.1, 4), (0.5, 0), (0.5, 4, 1.0), (NAN, 4)])
def test_wilson_interval_of_no_share_is_an_error(arguments):
    with pytest.raises(ValueError, match="mean="):
        wilson_interval(*arguments)


def test_probability_above_zero_agrees_with_the_interval():
    """Differences about a mean of two standard errors: above zero with the normal's 0.977; mirrored, the rest of it."""
    x = np.random.default_rng(1).normal(size=200)
    x += 2 * x.std(ddof=1) / math.sqrt(200) - x.mean()
    above = probability_above_zero([x])
    assert above == pytest.approx(statistics.NormalDist().cdf(2), abs=0.015)
    assert above + probability_above_zero([-x]) == pytest.approx(1)
    assert math.isnan(probability_above_zero([[1.0]]))
    with pytest.raises(ValueError, match="resamples=0"):
        probability_above_zero([x], resamples=0)


# Rank correlation


def brute_force_spearman(x: list[int], y: list[int]) -> float:
    def ranks(values: list[int]) -> list[Fraction]:
        return [Fraction(2 * sum(b < a for b in values) + sum(b == a for b in values) + 1, 2) for a in values]

    def covariance(a: list[Fraction], b: list[Fraction]) -> Fraction:
        pairs = itertools.product(zip(a, b, strict=True), repeat=2)
        return sum(((p[0] - q[0]) * (p[1] - q[1]) for p, q in pairs), Fraction())

    r, s = ranks(x), ranks(y)
    scale = covariance(r, r) * covariance(s, s)
    return float(covariance(r, s)) / math.sqrt(scale) if scale else NAN


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_spearman_is_the_correlation_of_ranks_counted_by_hand(pairs):
    x, y = map(list, zip(*pairs, strict=True))
    assert spearman(x, y) == pytest.approx(brute_force_spearman(x, y), nan_ok=True)
    assert spearman([-a for a in x], y) == pytest.approx(-spearman(x, y), nan_ok=True)
    assert spearman([math.exp(a) for a in x], y) == pytest.approx(spearman(x, y), nan_ok=True)


@given(st.permutations(range(8)))
def test_spearman_without_ties_is_the_sum_of_squared_rank_differences(y):
    squares = sum((i - j) ** 2 for i, j in enumerate(y))
    assert spearman(range(8), y) == pytest.approx(1 - 6 * squares / (8 * (8**2 - 1)))


def test_spearman_at_its_ends():
    x = [0.1, 0.3, 0.2, 5.0]
    assert spearman(x, x) == 1.0
    assert spearman(x, [-a for a in x]) == -1.0
    assert math.isnan(spearman(x, [2.0] * 4))
    assert math.isnan(spearman([1.0], [1.0]))
    with pytest.raises(ValueError, match="4 values can't be paired with 3"):
        spearman(x, x[:3])


# Curves


@given(CURVES, st.sampled_from([0.0, 0.5, 0.9]))
def test_smoothing_is_the_weighted_mean_of_what_was_measured(curve, weight):
    for t, y in enumerate(smooth(curve, weight)):
        measured = [x for x in curve[: t + 1] if x is not None]
        weights = [weight**age for age in range(len(measured))]
        expected = sum(w * x for w, x in zip(weights, measured[::-1], strict=True)) / sum(weights) if measured else NAN
        assert y == pytest.approx(expected, nan_ok=True)


def test_smoothing_has_no_bias_at_the_start_and_skips_missing_points():
    np.testing.assert_allclose(smooth([0.7] * 5), 0.7)
    np.testing.assert_allclose(smooth([None, 1.0, NAN, INF, 0.0], weight=0.5), [NAN, 1.0, 1.0, 1.0, 1 / 3])
    assert smooth([]).shape == (0,)
    for weight in (-0.1, 1.0, NAN):
        with pytest.raises(ValueError, match="weight="):
            smooth([1.0], weight)


RISE = [0.3] * 10 + [0.9] * 30


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        pytest.param(RISE + [0.0] * 30, 46, id="falls to zero: the average halves after 6 points and a bit"),
        pytest.param(RISE + [0.0] * 30 + [0.9] * 30, None, id="recovers"),
        pytest.param(RISE + [0.0] * 30 + [0.9] * 30 + [0.0] * 30, 106, id="falls, recovers and falls for good"),
        pytest.param(RISE + [0.4] * 60, 63, id="falls below half of its best, though above its base"),
        pytest.param(RISE + [0.5] * 60, None, id="falls, but stays above half of its best"),
        pytest.param([0.3] * 60, None, id="never learns"),
        pytest.param([0.0] * 60, None, id="never right"),
        pytest.param([0.3] * 20 + [0.1] * 60, 32, id="never learns, and falls below half of its start"),
        pytest.param(RISE + [0.0] * 5, None, id="the last points alone are no collapse yet"),
        pytest.param(RISE + [0.0] * 7, 46, id="dies at the end"),
        pytest.param([1.0] + [0.3] * 60, None, id="one lucky batch at the start is not a best"),
        pytest.param(RISE + [NAN] * 30, None, id="no measurement at the end is no collapse"),
        pytest.param(RISE + [0.0] * 30 + [NAN] * 5, 46, id="nor a recovery"),
        pytest.param([NAN] * 5 + RISE + [NAN] * 5 + [0.0] * 30, 56, id="indices are those of the curve"),
        pytest.param([NAN] * 60, None, id="nothing measured"),
        pytest.param([0.9] * 3 + [0.0] * 6, None, id="too short for a full average"),
        pytest.param([0.9] * 3 + [0.0] * 30, 14, id="dies before the average is full"),
        pytest.param([], None, id="empty"),
    ],
)
def test_what_is_a_collapse(accuracy, expected):
    assert collapsed(accuracy) == expected
    assert collapsed([None if math.isnan(x) else x for x in accuracy]) == expected


def brute_force_collapse(curve: list[float | None], fraction: float) -> int | None:
    """Every measured point but the first, as an average at a weight of 1/2 is full with two."""
    y = [(t, smooth(curve[: t + 1], 0.5)[-1]) for t, x in enumerate(curve) if x is not None][1:]
    below = [value < fraction * max(best for _, best in y[: i + 1]) for i, (_, value) in enumerate(y)]
    return next((t for i, (t, _) in enumerate(y) if all(below[i:])), None)


@given(CURVES, st.sampled_from([0.3, 0.5, 0.9, 1.0]))
def test_collapse_by_its_definition(curve, fraction):
    assert collapsed(curve, fraction, weight=0.5) == brute_force_collapse(curve, fraction)


@given(CURVES, st.integers(0, 24))
def test_a_missing_point_takes_no_side(curve, at):
    with_gap = [*curve[:at], None, *curve[at:]]
    index, gapped = collapsed(curve, weight=0.5), collapsed(with_gap, weight=0.5)
    assert gapped == (None if index is None else index + (index >= at))
    completions = list(range(len(curve)))
    assert reach(completions, curve, 0.6, 2, 0.5) == reach(
        [*completions[:at], -1, *completions[at:]], with_gap, 0.6, 2, 0.5
    )


def test_exact_accuracies_need_no_smoothing():
    assert collapsed([0.5, 0.9, 0.4], weight=0.0) == 2
    assert collapsed([0.5, 0.9, 0.46], weight=0.0) is None
    assert collapsed([0.5, 0.9, 0.46], weight=0.0, fraction=0.6) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accuracy": [-0.5] * 20}, "never negative"),
        ({"accuracy": [0.5] * 20, "fraction": 0.0}, r"fraction=0\.0"),
        ({"accuracy": [], "fraction": 1.5}, r"fraction=1\.5"),
        ({"accuracy": [], "fraction": NAN}, "fraction=nan"),
        ({"accuracy": [], "weight": 1.0}, r"weight=1\.0"),
    ],
)
def test_bad_collapses_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        collapsed(**arguments)


def test_the_target_is_reached_by_the_average_not_by_one_batch():
    completions = [16.0 * i for i in range(1, 61)]
    assert reach(completions, [1.0] + [0.5] * 59, 0.9) is None
    assert reach(completions, [0.5] * 20 + [1.0] * 40, 0.75) == 16.0 * 26
    assert reach(completions, [0.8] * 60, 0.75) == 160.0  # the tenth point, when the average is full
    assert reach(completions, [NAN] * 5 + [0.8] * 55, 0.75) == 240.0
    assert reach(completions, [0.5] * 60, 0.75) is None
    assert reach([], [], 0.75) is None


def test_the_target_must_be_held_for_as_long_as_is_asked():
    completions, accuracy = list(range(10, 80, 10)), [0.0, 0.9, 0.0, 0.9, 0.9, 0.9, 0.0]
    held = [reach(completions, accuracy, 0.9, sustain, weight=0.0) for sustain in range(1, 5)]
    assert held == [20.0, 40.0, 40.0, None]
    assert reach(completions, [0.0] * 6 + [0.9], 0.9, sustain=2, weight=0.0) is None  # cut off before it could hold
    for arguments in ((completions, accuracy[:3], 0.9), (completions, accuracy, 0.9, 0)):
        with pytest.raises(ValueError, match="7 completions"):
            reach(*arguments)


# Completions to a target


@pytest.mark.parametrize(
    ("reached", "expected"),
    [
        ([2400, 1600, 1920, 2000, 800], "5/5, median 1,920"),
        ([1600, None, 800, None, None], "2/5, median > 3,200"),
        ([1600, None, 800, 2400, None], "3/5, median 2,400"),
        ([1600, None, 800, None], "2/4, median 1,600"),
        ([None], "0/1, median > 3,200"),
    ],
)
def test_a_median_is_printed_with_its_censoring(reached, expected):
    assert str(completions_to_target(reached, [3200.0] * len(reached))) == expected


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        # Miller 1997, maintenance of leukaemia's remission; a minus sign is a censored time
        ([9, 13, -13, 18, 23, -28, 31, 34, -45, 48, -161], CompletionsToTarget(7, 11, 31.0, None)),
        ([5, 5, 8, 8, 12, -16, 23, 27, 30, 33, 43, 45], CompletionsToTarget(11, 12, 23.0, None)),
        # four runs that were stopped early say little, and the one with a long budget says nothing of them
        ([-100, -100, -100, -100, -3200], CompletionsToTarget(0, 5, None, 100.0)),
        ([-100, -100, -100, 200, 300], CompletionsToTarget(2, 5, None, 100.0)),
        ([-50, -60, 100, -200, -200], CompletionsToTarget(1, 5, None, 60.0)),
    ],
)
def test_medians_of_censored_runs(times, expected):
    assert completions_to_target([t if t > 0 else None for t in times], [abs(t) for t in times]) == expected


RUNS = st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.integers(1, 9)), min_size=1, max_size=9)


@given(RUNS)
def test_the_median_is_never_better_or_worse_than_any_end_of_the_censored_runs(runs):
    """Whatever a cut-off run would have needed past its budget, `above` and the least possible median hold."""
    total = len(runs)
    result = completions_to_target([t if there else None for t, there, _ in runs], [t for t, _, _ in runs])
    assert (result.reached, result.total) == (sum(there for _, there, _ in runs), total)

    def middle(past_budget: list[float]) -> float:
        ends = [t if there else t + more for (t, there, _), more in zip(runs, past_budget, strict=True)]
        return sorted(ends)[(total + 1) // 2 - 1]

    if result.reached * 2 < total:
        assert result.median is None
        assert result.above is not None
        assert middle([more for _, _, more in runs]) > result.above
        assert middle([1e-9] * total) > result.above
    else:
        assert result.above is None
        assert middle([0.0] * total) <= result.median <= middle([INF] * total)


@given(st.lists(st.none() | st.integers(1, 9), min_size=1, max_size=9))
def test_with_one_budget_the_median_is_the_middle_run(reached):
    result = completions_to_target(reached, [10.0] * len(reached))
    middle = sorted(INF if at is None else at for at in reached)[(len(reached) + 1) // 2 - 1]
    assert (result.median, result.above) == ((None, 10.0) if middle == INF else (middle, None))


@pytest.mark.parametrize(
    ("reached", "budgets", "message"),
    [
        ([], [], "no runs"),
        ([1.0], [1.0, 2.0], "argument 2 is longer"),
        ([3.0], [2.0], r"reached at 3\.0 of a budget of 2\.0"),
        ([NAN], [2.0], "reached at nan"),
        ([None], [INF], "a budget of inf"),
        ([None], [-1.0], r"a budget of -1\.0"),
    ],
)
def test_bad_runs_are_named(reached, budgets, message):
    with pytest.raises(ValueError, match=message):
        completions_to_target(reached, budgets)


def test_the_interval_of_a_median_of_completions_holds_the_median_and_censoring_opens_it():
    reached = [1000.0, 1200.0, 1500.0, 1800.0, 2100.0]
    budgets = [3000.0] * 5
    low, high = interval_to_target(reached, budgets)
    assert low <= completions_to_target(reached, budgets).median <= high < math.inf
    assert {low, high} <= set(reached)
    assert interval_to_target([*reached[:3], None, None], budgets)[1] == math.inf
    assert interval_to_target([None] * 5, budgets) == (math.inf, math.inf)
    assert all(math.isnan(end) for end in interval_to_target([1000.0], [3000.0]))
    with pytest.raises(ValueError, match="no runs"):
        interval_to_target([], [])
