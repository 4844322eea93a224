"""The examples run, with the README's two changed lines and without them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    script = sys.modules[name] = importlib.util.module_from_spec(spec)  # where a dataclass looks for its module
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize("stock", [False, True])
def test_the_trl_script_trains(tmp_path, stock, capsys):
    first, last = example("trl_script").main(
        ["--max-steps", "2", "--output-dir", str(tmp_path), *(["--stock"] if stock else [])]
    )
    assert 0 <= first <= 1 and 0 <= last <= 1
    assert "reward of the first tenth" in capsys.readouterr().out


def test_a_stock_trainer_is_watched(tmp_path, capsys):
    steps = example("monitor_callback").main(["--max-steps", "2", "--output-dir", str(tmp_path)])
    assert [entry["capo/kl/measured"] > 0 for entry in steps] == [True, True]
    assert "step 2: reward" in capsys.readouterr().out


def test_a_judge_that_fails_costs_a_batch(tmp_path):
    steps = example("judge_reward").main(["--max-steps", "3", "--output-dir", str(tmp_path)])
    assert [entry["capo/rewards_missing"] for entry in steps] == [0, 8, 0]
    assert [entry["reward"] is None for entry in steps] == [False, True, False]


def test_lora_is_held_to_the_budget(tmp_path):
    steps = example("lora").main(["--max-steps", "3", "--output-dir", str(tmp_path)])
    assert all(0 < entry["capo/kl/measured"] <= 5e-3 for entry in steps)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    assert example("resume").main(["--max-steps", "2", "--output-dir", str(tmp_path)])


@pytest.fixture
def eight_curves():
    """Those of docs/metrics.md, which tests/pages/test_doctor.py finds among what a run logs."""
    docs = (EXAMPLES.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    section = docs.split("## The eight curves that matter")[1].split("## Everything")[0]
    return [f"train/{name}" for name in re.findall(r"^\| `(\S+)` \|", section, re.MULTILINE)]


def test_a_trackio_dashboard_has_the_eight_curves(eight_curves, capsys):
    example("dashboard").main(["trackio", "my project", "--at", "http://host/"])
    asked = parse_qs(urlsplit(capsys.readouterr().out).query)
    assert asked["project"] == ["my project"]
    assert asked["metrics"] == [",".join(eight_curves)]


def test_a_wandb_view_has_the_eight_curves(eight_curves):
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed")
    (section,) = example("dashboard").wandb_view("me", "my project").sections
    assert [name for panel in section.panels for name in panel.y] == eight_curves
    assert [panel.y for panel in section.panels if panel.log_y] == [["train/capo/kl/measured"], ["train/grad_norm"]]


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < (140 if path.stem == "own_loop" else 60), path


def test_the_verl_reward_scores_right_wrong_and_what_has_no_verdict():
    compute_score = example("verl_reward").compute_score
    assert compute_score("math", r"\boxed{\sqrt{2}/2}", r"\frac{1}{\sqrt{2}}", {}) == {
        "score": 1.0, "acc": True, "graded": True,
    }  # fmt: skip
    assert compute_score("math", r"\boxed{2}", "3")["score"] == 0.0
    assert compute_score("math", r"\boxed{2}", "x^") == {"score": 0.0, "acc": False, "graded": False}


def test_verl_loads_the_reward():
    trainer = pytest.importorskip("verl.trainer.ppo.reward", reason="verl is not installed")
    settings = {"path": str(EXAMPLES / "verl_reward.py"), "name": "compute_score"}
    config = pytest.importorskip("omegaconf").OmegaConf.create({"reward": {"custom_reward_function": settings}})
    score = trainer.get_custom_reward_fn(config)("math", r"\boxed{2}", "2", extra_info={})
    assert score == {"score": 1.0, "acc": True, "graded": True}


def test_the_harness_filters_by_the_grader():
    filters = pytest.importorskip("lm_eval.filters", reason="lm-evaluation-harness is not installed")
    example("lm_eval_filter")
    ensemble = filters.build_filter_ensemble("capo", [["capo", {"gold": "answer"}], ["take_first", None]])
    ensemble_filter = ensemble.filters[0]()
    docs = [{"answer": r"\frac{1}{2}"}, {"answer": "3"}]
    filtered = ensemble_filter.apply([[r"So \boxed{0.5}"], [r"\boxed{4}"]], docs)
    assert filtered[0] == [r"\frac{1}{2}"] and filtered[1] != ["3"]
