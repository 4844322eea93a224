"""Grids of runs: what is refused, that nothing runs twice, and that every figure is drawn from results alone."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import warm
from capo_rl.settings.recipe import read_recipe
from capo_rl.testbed.arms import MAIN
from capo_rl.testbed.bench import BESIDE, CURVES, BenchError, quick, read_bench, read_results, run_bench, slug
from capo_rl.testbed.drawing import new_figure, save
from capo_rl.testbed.figures import FIGURES
from capo_rl.testbed.results import draw_results
from capo_rl.testbed.tables import TABLES
from conftest import ROOT

EXPERIMENTS = ROOT / "experiments"


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_bench_is_read_and_every_arm_is_a_recipe(path, tmp_path):
    if path.stem == "recipe":
        read_recipe(str(path))
        return
    bench = read_bench(path)
    assert Path(bench.recipe).exists()
    shared = Path(bench.recipe).read_text()
    for fields in bench.arms.values():
        changed = {name: value for name, value in fields.items() if name not in BESIDE}
        kept = [line for line in shared.splitlines() if line.split(":")[0] not in changed]
        (tmp_path / "r.yaml").write_text("\n".join([*kept, *(f"{n}: {json.dumps(v)}" for n, v in changed.items())]))
        read_recipe(str(tmp_path / "r.yaml"), ["--capo_mode", "mask"] if "rival" in fields else [])


def test_tuning_and_comparison_use_different_seeds():
    compared = set(read_bench(EXPERIMENTS / "main.yaml").seeds)
    assert len(compared) == 5
    for name in ("thresholds", "learning_rate", "budget"):
        assert not compared & set(read_bench(EXPERIMENTS / f"{name}.yaml").seeds)


@pytest.fixture(autouse=True)
def workers_that_need_not_import_torch_again(monkeypatch):
    monkeypatch.setattr("capo_rl.testbed.bench.multiprocessing", SimpleNamespace(get_context=lambda _: warm.CONTEXT))


def write(folder: Path, text: str) -> Path:
    (folder / "b.yaml").write_text(text)
    return folder / "b.yaml"


def test_a_grid_has_every_combination(tmp_path):
    bench = read_bench(
        write(
            tmp_path,
            "recipe: r.yaml\nseeds: [1]\ncommon: {beta: 0.5}\narms: {plain: {}}\n"
            "grid:\n  - {A: {beta: 0.0}, B: {}}\n  - {x: {epsilon: 0.1}, y: {epsilon: 0.2}}",
        )
    )
    assert bench.arms == {
        "plain": {"beta": 0.5},
        "A, x": {"beta": 0.0, "epsilon": 0.1},
        "A, y": {"beta": 0.0, "epsilon": 0.2},
        "B, x": {"beta": 0.5, "epsilon": 0.1},
        "B, y": {"beta": 0.5, "epsilon": 0.2},
    }
    assert slug("A, x") == "a-x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("- a", "needs the fields recipe, seeds"),
        ("recipe: r\nseeds: [1]\narm: {}", "no field arm; there are arms"),
        ("recipe: r\nseeds: [1]", "no arms; write some"),
        ("recipe: r\nseeds: [1]\narms: {'a b': {}, 'a, b': {}}", "two arms have the same folder name"),
    ],
)
def test_bench_files_that_cannot_be_used(tmp_path, text, message):
    with pytest.raises(BenchError, match=message):
        read_bench(write(tmp_path, text))
    with pytest.raises(BenchError, match="no such file"):
        read_bench(tmp_path / "nowhere.yaml")
    with pytest.raises(BenchError, match="no results"):
        read_results(tmp_path)


def test_runs_that_have_a_result_are_not_run_again(tmp_path, capsys):
    common = "{max_steps: 2, dataset_limit: 32, learning_rate: 1e-4, capo_mode: mask, capo_fisher_threshold: .inf}"
    bench = read_bench(
        write(
            tmp_path,
            f"recipe: {EXPERIMENTS / 'recipe.yaml'}\nseeds: [1, 2]\ncommon: {common}\n"
            "test: {terms: 6, problems: 4, every: 1}\n"
            "arms:\n  random: {rival: {name: random, rate: 0.1}, train_only: lm_head}\n"
            "  broken: {rival: {name: dice, rate: 0.1}}",
        )
    )
    with pytest.raises(BenchError, match="no arm rando; there are random, broken"):
        run_bench(bench, tmp_path, only=["rando"])
    (path,) = run_bench(bench, tmp_path, seeds=1, only=["random"], workers=1)
    log = capsys.readouterr().err  # no bar is drawn in it
    assert "\r" not in log and re.search(r"^b: run 1 of 1, \d+ s, random, seed 1$", log, re.MULTILINE)
    (result,) = read_results(tmp_path / "b")
    assert (result["arm"], result["seed"]) == ("random", 1)
    assert all(len(result["curves"][name]) == 2 for name in CURVES)
    assert result["curves"]["capo/rejection_rate"][-1] == pytest.approx(0.1, abs=0.05)
    assert result["test"]["capo/completions"] == [0, 16, 32]
    assert all(0 <= accuracy <= 1 for accuracy in result["test"]["accuracy"])
    assert result["settings"]["rival"] == {"name": "random", "rate": 0.1}
    # with the head alone to train, the last-layer model predicts the update's KL
    predicted, measured = (result["curves"][f"capo/kl/{of}"] for of in ("predicted", "measured"))
    assert predicted[-1] == pytest.approx(measured[-1], rel=0.1)
    before = path.read_bytes()
    run_bench(bench, tmp_path, seeds=1, only=["random"], workers=1)
    assert path.read_bytes() == before
    with pytest.raises(RuntimeError, match="1 of 1 runs failed; the first was broken, seed 1"):
        run_bench(bench, tmp_path, seeds=1, only=["broken"], workers=1)


def test_an_arm_may_move_its_bounds(tmp_path):
    bench = quick(read_bench(EXPERIMENTS / "calibrated.yaml"), steps=3)
    run_bench(bench, tmp_path, only=["SGD, adapting to 5 %", "SGD, 5 %"])
    results = {result["arm"]: result for result in read_results(tmp_path / "calibrated-quick")}
    assert results["SGD, adapting to 5 %"]["settings"]["adapt"] == 0.05
    first, *others = results["SGD, adapting to 5 %"]["curves"]["capo/thresholds/fisher"]
    assert first == bench.arms["SGD, 5 %"]["capo_fisher_threshold"]
    assert others[-1] != first  # a step without a shift moves nothing
    assert results["SGD, 5 %"]["curves"]["capo/thresholds/fisher"] == [None, None, None]


def test_a_part_of_the_quick_form_of_the_main_comparison(tmp_path):
    bench = quick(read_bench(EXPERIMENTS / "main.yaml"), steps=2)
    arms = ["GRPO (A)", "CAPO, KL budget 1e-4", "5 uses, rival: total_variation"]
    run_bench(bench, tmp_path, only=arms)
    results = {result["arm"]: result["curves"] for result in read_results(tmp_path / "main-quick")}
    assert sorted(results) == sorted(arms)
    assert [curves["step"] for curves in results.values()] == [[1], [1, 2], [1, 2]]  # steps with fresh rollouts
    assert max(results["CAPO, KL budget 1e-4"]["capo/kl/measured"]) <= 1e-4
    assert (tmp_path / "main-quick" / "tables" / "methods.md") in [
        path.with_suffix(".md") for path in draw_results(tmp_path / "main-quick")
    ]


def made_up(arm: str, seed: int, final: float) -> dict:
    """A result of 60 steps whose accuracy goes from 0.5 to `final`."""
    steps = list(range(1, 61))
    accuracy = [0.5 + (final - 0.5) * min(1.0, step / 30) for step in steps]
    curves = {name: [1e-3 * (seed + step) for step in steps] for name in CURVES}
    curves |= {"step": steps, "capo/completions": [16 * step for step in steps], "reward": accuracy}
    curves["capo/kl/measured"] = [None, *(1e-3 * step for step in steps[1:])]
    return {
        "bench": "b",
        "arm": arm,
        "seed": seed,
        "settings": {},
        "versions": {},
        "hardware": "",
        "curves": curves,
        "test": {"capo/completions": [0, 960], "accuracy": [0.3, final], "perplexity": [9.0, 12.5 + seed]},
        "seconds": {"total": 10.0, "generation": 5.0, "curvature": 1.0, "kl": 0.5},
    }


def test_a_curve_has_a_gap_where_a_logarithm_has_no_value(tmp_path):
    figure, (axes,) = new_figure(1, "")
    axes.plot([1, 2, 3, 4], [1e-3, 0.0, -1e-3, 1e-2])
    axes.plot([0, 1], [1.0, 2.0])
    axes.set(xscale="log", yscale="log")
    save(figure, tmp_path / "one")
    assert [np.isfinite(line.get_ydata()).tolist() for line in axes.lines] == [
        [True, False, False, True],
        [False, True],
    ]


def test_every_figure_and_table_is_drawn_from_results_alone(tmp_path):
    arms = [
        *MAIN,
        "Dr.CAPO",
        "GRPO (A), β 0.1",
        "GRPO (A), 2 uses, ε 0.2",
        "CAPO, SGD",
        "GRPO, lr 1e-4",
        "GRPO, lr 1e-3",
        "rival: random",
        "GRPO, x",
        "CAPO, x",
        "ReinCAPO, 5 uses",
        "budget 1e-4",
        "SGD, CAPO, lr 0.5, δ_F 1",
        "SGD, soft, δ_F 1",
        "SGD, 5 %",
        "default, twice as deep",
        "GRPO 1e-4, twice as deep",
        "GRPO 3e-4, twice as deep",
        "GRPO, lag 16",
        "GRPO, lag 4, lr 1e-3",
    ]
    for arm in arms:
        for seed in (1, 2):
            path = tmp_path / slug(arm) / f"{seed}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(made_up(arm, seed, final=0.0 if arm == "GRPO (A)" else 0.95)))
    first = {path: path.read_bytes() for path in draw_results(tmp_path)}
    assert {path.stem for path in first} == {*FIGURES, *TABLES}
    assert {path: path.read_bytes() for path in draw_results(tmp_path)} == first  # the same results, the same files
    methods = json.loads((tmp_path / "tables" / "methods.json").read_text())
    row = {row[0]: dict(zip(methods["columns"], row, strict=True)) for row in methods["rows"]}
    assert row["GRPO (A)"]["collapsed"] == "2/2"
    assert row["GRPO (A)"]["completions to 0.9 [95 %]"] == "0/2, median > 960"
    assert row["CAPO"]["collapsed"] == "0/2"
    assert row["CAPO"]["completions to 0.9 [95 %]"].startswith("2/2")
    assert row["CAPO"]["TEST"] == "0.950 ± 0.000"
    ranges = json.loads((tmp_path / "tables" / "range.json").read_text())
    assert [row[:3] for row in ranges["rows"]] == [["GRPO", "0.0001 ✓", "2"], ["GRPO", "0.001 ✓", "2"]]
    everywhere = json.loads((tmp_path / "tables" / "everywhere.json").read_text())
    assert [row[0] for row in everywhere["rows"]] == ["twice as deep"]
    assert dict(zip(everywhere["columns"], everywhere["rows"][0], strict=True))["at all its rates"] == "0/4"
    off_policy = json.loads((tmp_path / "tables" / "off_policy.json").read_text())
    assert [row[:2] for row in off_policy["rows"]] == [["lag 4", "GRPO"], ["lag 16", "GRPO"], ["5 uses", "ReinCAPO"]]
    language = json.loads((tmp_path / "tables" / "language.json").read_text())
    assert "9 → 14 (13.5 to 14.5)" in language["rows"][0]
    table5 = json.loads((tmp_path / "tables" / "table5.json").read_text())
    assert math.isclose(float(table5["rows"][0][1].split(" ± ")[0]), 1.0)
