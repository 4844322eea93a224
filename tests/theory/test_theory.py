"""The paper's statements on small MDPs: they hold, wrong ones are caught, and the cases docs/theory.md speaks of."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from capo_rl.theory import checks, counterexamples, statements
from capo_rl.theory import guarantee as theory
from capo_rl.theory.guarantee import MDP, Setting

SETTINGS = [Setting(gamma=0.0), Setting(gamma=0.2), Setting(gamma=0.9), Setting(horizon=2), Setting(horizon=5)]
by_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)


def tried(setting: Setting, n: int = 60) -> list[statements.Check]:
    mdp, theta = theory.random_mdps(n, 7, setting)
    step = theory.random_steps(theta, 8)
    rows = [
        f(mdp, theta, step) for f in (statements.check_expansions, statements.check_derivatives, statements.check_gaps)
    ]
    rows += [statements.check_aggregation(mdp, theta, subsets, 9) for subsets in (1, 2, 3, 8)]
    return list(itertools.chain(*rows))


def used(rows: list[statements.Check], start: str) -> float:
    (row,) = (x for x in statements.merge(rows) if x.statement.startswith(start))
    return row.used


@by_setting
def test_every_statement_holds(setting):
    broken = [x for x in tried(setting) if x.violations and not x.statement.endswith("[wrong]")]
    assert not broken


def test_every_wrong_statement_is_caught_and_the_tight_ones_are_tight():
    rows = list(itertools.chain(*(tried(x) for x in SETTINGS)))
    wrong = [x for x in statements.merge(rows) if x.statement.endswith("[wrong]")]
    assert len(wrong) == 6
    assert all(x.violations for x in wrong)
    # a constant 3 % smaller would be caught in each of these
    for name in ("Pinsker", "Eq. 94: ", "Eq. 74", "Eq. 79: ", "Eq. 79 with", "Eq. 80 with ½"):
        assert used(rows, name) > 0.97, name


def test_the_fisher_constant_is_sharp():
    # one state, two actions, at the p where p(1−p)(1−2p) is largest
    p, one = (3 - math.sqrt(3)) / 6, torch.ones((1, 1), dtype=torch.float64)
    theta = torch.tensor([[[math.log(p / (1 - p)), 0.0]]], dtype=torch.float64)
    mdp = MDP(Setting(horizon=1), one.expand(1, 1, 2, 1), torch.zeros_like(theta), one)
    rows = statements.check_expansions(mdp, theta, torch.tensor([[[0.01, -0.01]]], dtype=torch.float64))
    assert not any(x.violations for x in rows)
    assert used(rows, "Eq. 26") > 0.999


@pytest.mark.parametrize(("setting", "least"), [(Setting(gamma=0.2), 0.3), (Setting(horizon=2), 0.6)], ids=str)
def test_a_search_finds_no_violation_but_catches_a_constant_too_small(setting, least, monkeypatch):
    start = theory.random_mdps(32, 3, setting)
    paper, sharp = statements.search_gap(*start, 3, iterations=150)
    assert paper.violations == sharp.violations == 0
    assert paper.used > least
    C = theory.constant(setting)
    monkeypatch.setattr(statements, "constant", lambda *_: 0.9 * least * C)
    assert statements.search_gap(*start, 3, iterations=150)[0].violations
    monkeypatch.undo()
    (brace,) = statements.search_gap(*start, 3, power=1.0, iterations=150)  # Eq. 81 has m_F under its brace
    assert brace.violations


def test_nan_is_a_violation():
    assert statements.check("", torch.tensor([math.nan, 0.0])).violations == 1


@by_setting
def test_orders(setting):
    mdp, theta = theory.random_mdps(60, 1, setting)
    found = counterexamples.orders(mdp, theta, theory.random_steps(theta, 2, -2, -2))
    bandit = theory.constant(setting) == 0  # where L = J
    expected = {"Eq. 5:": 3, "Eq. 5 with": 3 if bandit else 2, "Eq. 66:": 3 if bandit else 2, "Eq. 66 with": 3}
    for name, power in (expected | {"Eq. 26": 3, "Eq. 81": 1}).items():
        (order,) = (x for key, x in found.items() if key.startswith(name))
        assert order == pytest.approx(power, abs=0.05), name


# the exact quantities, against others written anew


def test_finite_horizon_against_every_trajectory():
    mdp, theta = theory.random_mdps(1, 5, Setting(horizon=3), S=2, A=2)
    P, R, rho, pi = mdp.P[0], mdp.R[0], mdp.rho[0], theta[0].softmax(-1)

    def walk(s: int, t: int) -> float:
        """V_t(s) by recursion over trajectories."""
        if t == 3:
            return 0.0
        return float(sum(pi[s, a] * (R[s, a] + sum(P[s, a, z] * walk(z, t + 1) for z in range(2))) for a in range(2)))

    now = theory.evaluate(mdp, theta)
    assert float(now.J) == pytest.approx(sum(float(rho[s]) * walk(s, 0) for s in range(2)), rel=1e-12)
    for t, s, a in itertools.product(range(3), range(2), range(2)):
        q = float(R[s, a]) + sum(float(P[s, a, z]) * walk(z, t + 1) for z in range(2))
        assert float(now.A[0, t, s, a]) == pytest.approx(q - walk(s, t), abs=1e-12)
    path = itertools.product(range(2), repeat=5)  # s0 a0 s1 a1 s2
    reach = [0.0, 0.0]
    for s, a, z, b, y in path:
        reach[y] += float(rho[s] * pi[s, a] * P[s, a, z] * pi[z, b] * P[z, b, y])
    assert now.d[0, 2].tolist() == pytest.approx(reach, abs=1e-12)


def test_discounted_against_the_series():
    mdp, theta = theory.random_mdps(3, 6, Setting(gamma=0.7))
    now, pi, d = theory.evaluate(mdp, theta), theta.softmax(-1), mdp.rho
    J, total = torch.zeros(3, dtype=torch.float64), torch.zeros_like(mdp.rho)
    for t in range(200):
        J, total = J + 0.7**t * (d[..., None] * pi * mdp.R).sum((1, 2)), total + 0.7**t * d
        d = torch.einsum("ns,nsa,nsap->np", d, pi, mdp.P)
    torch.testing.assert_close(now.J, J)
    torch.testing.assert_close(now.d[:, 0], total)


@by_setting
def test_derivatives_against_differences_and_fisher_against_kl(setting):
    mdp, theta = theory.random_mdps(4, 2, setting)
    here, x = theory.local(mdp, theta), theory.random_steps(theta, 3, -3, -3)
    up, down = theory.evaluate(mdp, theta + x), theory.evaluate(mdp, theta - x)
    flat = x.flatten(1)
    torch.testing.assert_close((up.J - down.J) / 2, (here.g * flat).sum(-1), rtol=1e-4, atol=1e-8)
    second = 2 * theory.half_quadratic(here.H_J, flat)
    torch.testing.assert_close(up.J - 2 * here.now.J + down.J, second, rtol=1e-3, atol=1e-11)
    hessian = theory.derivatives(lambda y: theory.kl(here.now, theta, y), theta)[1]
    torch.testing.assert_close(here.F, hessian)


# Theorem 5.1


def test_half_is_enough_whatever_the_hessian():
    # mean m_H(Δθᵢ) − m_H(Δθ) = ½ mean (Δθᵢ − Δθ)ᵀH(Δθᵢ − Δθ) ≤ ½ M (mean ‖Δθᵢ‖² − ‖Δθ‖²) ≤ ½ M (r² − ‖Δθ‖²)
    torch.manual_seed(0)
    H, g = torch.randn(3000, 5, 5, dtype=torch.float64), torch.randn(3000, 5, dtype=torch.float64)
    H = H + H.mT
    for subsets in (2, 3, 7):
        steps = torch.randn(3000, subsets, 5, dtype=torch.float64)
        mean, M, r = steps.mean(1), torch.linalg.matrix_norm(H, 2), steps.norm(dim=-1).amax(1)
        lost = theory.shift(g, H, steps).mean(1) - theory.shift(g, H, mean)
        torch.testing.assert_close(lost, theory.half_quadratic(H, steps - mean[:, None]).mean(1))
        assert (lost <= M / 2 * (r**2 - (mean**2).sum(-1)) + 1e-9).all()
        omega = theory.shift(g, H, steps).amin(1) - M * r**2 / 2
        assert (theory.shift(g, H, mean) >= omega - 1e-9).all()


@pytest.mark.parametrize(("share", "downhill"), [(0.4, 1e-3), (0.49, 1e-4), (0.499, 1e-5)])
def test_less_than_half_lets_a_fall_through(share, downhill):
    mdp, theta, steps = counterexamples.opposite_pair(downhill)
    p, M = statements.premise(mdp, theta, steps), statements.curvature(mdp, theta)
    assert (p.m_h - share * M * p.r_2 > 0).all()
    assert float(p.penalty) == 0
    assert (p.gain < 0).all()
    assert (p.m_h - 0.5 * M * p.r_2 < 0).all()  # the statement's ½ turns both steps away


def test_a_long_step_meets_the_conditions_at_theta_and_lowers_j():
    mdp, theta, steps = counterexamples.neglected_cubic()
    p, step = statements.premise(mdp, theta, steps), steps.view_as(theta)
    for share in (1.0, 0.5):
        assert (p.m_h - share * statements.curvature(mdp, theta) * p.r_2 > p.penalty).all()
        assert float(p.gain[0]) < -0.4
    # a bound on H all along the step turns it away, and the measured KL of Eq. 65 sees what m_F doesn't
    assert (p.m_h - 0.5 * statements.curvature(mdp, theta, step) * p.r_2 < 0).all()
    D = theory.kl(theory.evaluate(mdp, theta), theta, theta + step)
    assert float(D) > 50 * float(theory.half_quadratic(theory.local(mdp, theta).F, steps))


def test_with_m_along_the_step_the_proofs_constant_is_exact_and_the_statements_is_not():
    # J' − J = gᵀΔθ + ∫ (1−τ) ΔθᵀHΔθ dτ ≥ gᵀΔθ − ½ Mr², and gᵀΔθᵢ ≥ ω + share · Mr² − ½ Mr²
    mdp, theta, steps = counterexamples.past_the_bend()
    p, M = statements.premise(mdp, theta, steps), statements.curvature(mdp, theta, steps.view_as(theta))
    assert (p.gain < p.m_h - 0.5 * M * p.r_2 - 0.2).all()
    assert (p.gain > p.m_h - 1.0 * M * p.r_2).all()
    rows = [statements.check_theorem(*theory.random_mdps(300, 3, x), 30.0, 1) for x in SETTINGS]
    proof, statement = zip(*(map(int, str(x["gain < ω"]).split(" / ")) for x in rows), strict=True)
    assert sum(proof) == 0
    assert sum(statement) > 0
    assert all(x["gain < 0"] == "0 / 0" for x in rows)


@pytest.mark.parametrize("setting", [Setting(gamma=0.34), Setting(gamma=0.9), Setting(horizon=3), Setting(horizon=10)])
def test_no_step_is_ever_covered(setting):
    assert theory.constant(setting) > theory.omega_ceiling(setting, 1.0)
    for norm in (0.1, 30.0):
        row = statements.check_theorem(*theory.random_mdps(100, 4, setting), norm, 5)
        assert row["ω ≥ C√δ_F"] == "0 / 0"
        assert row["ω > 0"] != "0 / 0"
        assert row["Eq. 13 fails"] == "0 / 0"
        assert row["yet J fell"] == 0
    small = statements.check_theorem(*theory.random_mdps(100, 4, setting), 0.1, 5)
    assert small["L − J ≥ C'√KL"] > 80  # with max_s |Ā(s)| for ε, most are


@pytest.mark.parametrize("setting", [Setting(gamma=1 / 3 - 1e-9), Setting(horizon=2)])
def test_short_horizons_leave_room(setting):
    assert theory.constant(setting) < theory.omega_ceiling(setting, 1.0)


def test_constants_of_the_paper():
    assert theory.constant(Setting(gamma=0.9), 2.0) == pytest.approx(2 * 0.9 / 0.1**2 * 2.0 * math.sqrt(2))
    # Eq. 106: √2 ε √(Σ j²) √T
    for T in (1, 2, 7, 1024):
        b = sum(j**2 for j in range(T))
        assert theory.constant(Setting(horizon=T), 0.5) == pytest.approx(math.sqrt(2 * b * T) * 0.5)
    llm = next(x for x in counterexamples.horizons() if x["setting"] == "T = 1024")
    assert llm["C√δ_F"] == pytest.approx(8555, abs=1)
    assert llm["C√δ_F / largest ω"] == pytest.approx(590.8, abs=0.1)
    assert llm["√(T δ_F/2)"] == pytest.approx(0.2263, abs=1e-4)


@pytest.mark.parametrize("bad", [{}, {"gamma": 0.5, "horizon": 3}, {"gamma": 1.0}, {"gamma": -0.1}, {"gamma": math.nan},
                                 {"horizon": 0}])  # fmt: skip
def test_settings_out_of_range(bad):
    with pytest.raises(ValueError, match="need a discount"):
        Setting(**bad)


def test_guarantee():
    short = Setting(gamma=0.1)
    good = theory.guarantee(short, [0.2, 0.3], [1e-3, 4e-3], M=1.0, r=0.2, epsilon=1.0)
    assert good.covered
    assert good.omega == pytest.approx(0.16)
    assert good.bound == pytest.approx(0.16 - theory.constant(short) * math.sqrt(4e-3))
    assert theory.guarantee(short, [0.2], [0.0], 1.0, 0.2, 1.0, margin=0.5).bound == pytest.approx(0.18)

    def why(m_h=(0.2, 0.3), m_f=(1e-3, 4e-3), M=1.0, r=0.2, setting=short, **more) -> str:
        return "; ".join(theory.guarantee(setting, m_h, m_f, M, r, 1.0, **more).fails)

    assert why() == ""
    assert why((), ()) == "no subset was accepted"
    assert "not positive" in why(r=0.7)
    assert why(m_f=(0.5, 0.5)) == "ω = 0.16 is 0.0869 below C √δ_F"
    assert why(kl=1e-2) == "the measured KL 0.01 is above δ_F = 0.004"
    assert "at this horizon no step" in why(setting=Setting(horizon=1024))
    assert "not positive" in why((0.2, math.nan))
    for bad in ({"M": -1.0}, {"r": math.nan}, {"margin": 0.4}, {"m_f": (1.0,)}, {"m_f": (-1.0, 1.0)}, {"kl": -1.0}):
        with pytest.raises(ValueError, match="epsilon="):
            why(**bad)


@pytest.mark.parametrize("norm", [0.05, 1.0, 10.0])
def test_guarantee_is_kept(norm):
    setting, n = Setting(gamma=0.2), 200
    mdp, theta = theory.random_mdps(n, 11, setting)
    here, size = theory.local(mdp, theta), torch.full((n,), norm, dtype=torch.float64)
    steps = statements.candidates(here.now.A[:, 0].flatten(1), 3, size, 12)
    step = steps.mean(1).view_as(theta)
    gain = (theory.evaluate(mdp, theta + step).J - here.now.J).tolist()
    m_h, m_f = theory.shift(here.g, here.H_L, steps).tolist(), theory.half_quadratic(here.F, steps).tolist()
    D, M, eps = theory.kl(here.now, theta, theta + step), statements.curvature(mdp, theta, step)[1], here.now.epsilon
    verdicts = [
        theory.guarantee(setting, m_h[i], m_f[i], float(M[i]), norm, float(eps[i]), kl=float(D[i])) for i in range(n)
    ]
    assert all(dJ >= x.bound for dJ, x in zip(gain, verdicts, strict=True))
    assert all(dJ >= 0 for dJ, x in zip(gain, verdicts, strict=True) if x.covered)
    assert norm > 0.05 or sum(x.covered for x in verdicts) > 3


def test_main_prints_and_writes_the_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checks, "search_gap", lambda *_: [])
    monkeypatch.setattr("sys.argv", ["theory_checks", "--cases", "6", "--json", str(tmp_path / "theory.json")])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    checks.main()
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "theory.json").read_text())
    assert list(written) == ["Statements", "Order of the error in ‖Δθ‖", "Theorem 5.1", "Counterexamples", "Horizons"]
    for title in written:
        assert f"## {title}\n\n| " in printed


def test_mdp_shapes():
    mdp, theta = theory.random_mdps(2, 0, Setting(horizon=3))
    assert isinstance(mdp, MDP)
    assert theory.evaluate(mdp, theta).A.shape == (2, 3, 4, 3)
    torch.testing.assert_close(mdp.P.sum(-1), torch.ones(2, 4, 3, dtype=torch.float64))
