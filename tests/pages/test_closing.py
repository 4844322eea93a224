"""The end of `capo train`: alive or not, GRPO's results for the quickstart alone, and a next command that works."""

from __future__ import annotations

import json
import sys

import pytest

from capo_rl.cli import make_parser
from capo_rl.pages.closing import GRPO_THERE, closing, is_quickstart
from capo_rl.settings.recipe import read_recipe
from capo_rl.statistics import collapsed
from conftest import ROOT

GRPO = ROOT / "results" / "main" / "grpo-a"


def ended(folder, rewards, *overrides, path="quickstart"):
    """The closing lines of a run with these rewards."""
    folder.mkdir()
    rows = [{"step": i, "reward": reward} for i, reward in enumerate(rewards, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows, following = closing(read_recipe(path, ["--output_dir", str(folder), *overrides]), path)
    make_parser().parse_args(following.split("    #")[0].split()[following.startswith("python") * 2 + 1 :])
    return dict(rows), following


def test_the_quickstart_lives_beside_grpo(tmp_path):
    rows, following = ended(tmp_path / "run", [0.6] * 50)
    assert rows == {"alive": "yes", "GRPO at this learning rate": GRPO_THERE}
    assert "train quickstart --capo_mode monitor --output_dir runs/grpo" in following


def test_what_is_said_of_grpo_is_what_its_results_say():
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(GRPO.glob("*.json"))]
    dead = [run["curves"]["step"][at] for run in runs if (at := collapsed(run["curves"]["reward"])) is not None]
    assert GRPO_THERE.startswith(
        f"{len(dead)} of {len(runs)} runs collapse, at steps {min(dead):.0f} to {max(dead):.0f} "
    )
    quickstart = read_recipe("quickstart")
    for run in runs:
        for name in ("learning_rate", "per_device_train_batch_size", "model_name_or_path", "dataset_name", "loss_type"):
            value = run["settings"][name]
            assert value == getattr(quickstart.training, name, value)


@pytest.mark.parametrize("change", [["--learning_rate", "1e-3"], ["--capo_mode", "monitor"], ["--max_steps", "20"]])
def test_of_other_runs_it_says_nothing_about_grpo(tmp_path, change):
    rows, following = ended(tmp_path / "run", [0.6] * 50, *change)
    assert rows == {"alive": "yes"}
    assert following.endswith(f"report {tmp_path / 'run'} --out report.html")


def test_a_dead_run_is_sent_to_the_doctor(tmp_path):
    rows, following = ended(tmp_path / "run", [0.6] * 50 + [0.0] * 20, "--learning_rate", "1e-2")
    assert rows == {"alive": "no, it collapsed at step 57"}
    assert following.endswith(f"doctor {tmp_path / 'run'}")


def test_a_short_run_cannot_be_told(tmp_path):
    rows, _ = ended(tmp_path / "run", [0.6] * 3, "--max_steps", "3")
    assert rows["alive"].startswith("can't tell: 3 logged steps with a reward")


def test_the_command_is_called_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / ".venv" / "bin" / "capo")])
    assert ended(tmp_path / "run", [0.6] * 50)[1].startswith(".venv/bin/capo train quickstart")
    monkeypatch.setattr(sys, "argv", ["/elsewhere/pytest"])
    assert closing(read_recipe("quickstart"), "quickstart")[1].startswith("python -m capo_rl.cli train")


def test_a_seed_and_a_folder_leave_it_the_quickstart():
    assert is_quickstart(read_recipe("quickstart", ["--seed", "3", "--output_dir", "runs/other"]))
