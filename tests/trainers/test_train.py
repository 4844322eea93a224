"""`capo train` from the recipe to the folder it leaves behind, killed and resumed on the way."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import warm
from capo_rl.runs.records import read_metrics
from conftest import ROOT

QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
SHORT = ["--max_steps", "8", "--dataset_limit", "64", "--save_steps", "2"]


def command(folder: Path, *options: str) -> list[str]:
    return ["-m", "capo_rl.cli", "train", QUICKSTART, "--output_dir", str(folder), *SHORT, *options]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return warm.run(command(folder, *options))


def weights(folder: Path) -> str:
    """The hash of the final weights and of the step model's moments."""
    files = [folder / "checkpoint-8" / name for name in ("model.safetensors", "capo_state.safetensors")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_leaves_its_records(whole):
    steps = read_metrics(whole)
    assert [entry["step"] for entry in steps] == list(range(1, 9))
    assert all(0 <= entry["reward"] <= 1 for entry in steps)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["completions"] == 8 * 16
    assert summary["settings"]["capo_mode" if "capo_mode" in summary["settings"] else "dataset_name"]
    assert {"torch", "trl", "capo-rl"} <= summary["versions"].keys()
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (whole / "checkpoint-8" / "model.safetensors").exists()
    assert (whole / "run.json").exists()


@pytest.mark.parametrize("after", [3, 4])
def test_a_killed_run_ends_as_if_nothing_had_happened(whole, tmp_path, after):
    """Killed after a step with a checkpoint and after one without."""
    folder = tmp_path / "run"
    process = warm.Process(command(folder))
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= after):
        assert process.poll() is None, "the run was over before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "summary.json").exists()
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert weights(folder) == weights(whole)
    assert all(entry["seconds"] > 0 for entry in read_metrics(folder))
    timeless = [
        [{key: value for key, value in entry.items() if "seconds" not in key and "time" not in key} for entry in steps]
        for steps in (read_metrics(folder), read_metrics(whole))
    ]
    assert timeless[0] == timeless[1]


def test_a_run_that_is_over_is_not_run_again(whole):
    before = (whole / "metrics.jsonl").read_bytes()
    done = run(whole)
    assert done.returncode == 0
    assert "is over already" in done.stderr
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_another_runs_folder_is_refused(whole):
    done = run(whole, "--learning_rate", "1e-5")
    assert done.returncode == 2
    assert "holds a run with other settings (learning_rate)" in done.stderr


def test_a_finished_run_is_made_longer_by_a_larger_max_steps(whole, tmp_path):
    """With a constant rate it is the run that would have been as long from the start."""
    folder, constant = tmp_path / "run", ("--lr_scheduler_type", "constant", "--warmup_steps", "0")
    assert run(folder, *constant, "--max_steps", "4").returncode == 0
    assert json.loads((folder / "summary.json").read_text())["steps"] == 4
    longer = run(folder, *constant)
    assert longer.returncode == 0, longer.stderr
    assert "schedule" not in longer.stderr
    assert json.loads((folder / "summary.json").read_text())["steps"] == 8
    assert [entry["step"] for entry in read_metrics(folder)] == list(range(1, 9))
    assert run(tmp_path / "at once", *constant).returncode == 0
    assert weights(folder) == weights(tmp_path / "at once")

    shorter = run(folder, *constant, "--max_steps", "6")
    assert shorter.returncode == 2
    assert "Only a larger max_steps may differ" in shorter.stderr


def test_a_longer_schedule_is_told_and_needs_a_checkpoint(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    # the settings of the copy are those of the run but for its folder
    description = json.loads((folder / "run.json").read_text())
    description["settings"]["output_dir"] = str(folder)
    (folder / "run.json").write_text(json.dumps(description))
    longer = run(folder, "--max_steps", "9")
    assert longer.returncode == 0, longer.stderr
    assert "a run of 8 steps goes on to 9: from here its learning rate is that of the cosine schedule" in longer.stderr
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    again = run(folder, "--max_steps", "10")
    assert again.returncode == 2
    assert "holds a run of 9 steps and no checkpoint" in again.stderr


def test_the_log_of_a_run_has_a_line_for_each_tenth(tmp_path):
    done = run(tmp_path / "run", "--max_steps", "20", "--save_strategy", "no")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "step" in line]
    assert [line.split(",")[0] for line in lines] == [f"run: step {step} of 20" for step in range(2, 21, 2)]
    rewards = [f"reward {entry['reward']:.2f}" for entry in read_metrics(tmp_path / "run")[1::2]]
    assert all(reward in line for reward, line in zip(rewards, lines, strict=True))
    assert "gold" not in done.stderr and "it/s" not in done.stderr


def test_the_model_card_names_the_model_the_method_and_the_paper(whole):
    card = (whole / "README.md").read_text()
    assert "a fine-tuned version of `embedded`" in card
    assert "CAPO, Curvature-Aware Policy Optimization" in card
    assert card.count("2510.00819") >= 3
    entry = card[card.index("@misc") :]
    assert all(entry.count(f"  {field} ") == 1 for field in ("title", "author", "year", "eprint", "archivePrefix"))
    assert entry.count("{") == entry.count("}") and "Melo, Luckeciano C. and Abate, Alessandro and Gal, Yarin" in entry
    assert "None" not in card and "DeepSeekMath" not in card


def test_a_recipe_that_is_missing_is_told_before_anything_heavy_loads():
    program = (
        "import sys; from capo_rl.cli import main; codes = [main([name, 'recipes/quickstrat.yaml']) for name in "
        "('train', 'calibrate')]; print(codes, sorted({'torch', 'trl', 'transformers'} & sys.modules.keys()))"
    )
    root = Path(QUICKSTART).parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[2, 2] []"
    assert done.stderr.count("recipes/quickstrat.yaml: no such file; did you mean recipes/quickstart.yaml?") == 2


def test_problems_that_cannot_be_graded_are_dropped_and_counted(tmp_path):
    data = tmp_path / "train.jsonl"
    rows = [{"problem": f"Compute {i}+1 mod 10.\n", "answer": str((i + 1) % 10)} for i in range(10)]
    data.write_text("\n".join(json.dumps(row) for row in [*rows, {"problem": "Compute 1+1 mod 10.\n", "answer": "x^"}]))
    done = run(tmp_path / "run", "--dataset_name", str(data), "--max_steps", "2")
    assert done.returncode == 0, done.stderr
    assert "left out 1 problems whose gold answer can't be parsed" in done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["dropped"] == {"ungradable": 1, "too_long": 0}
