"""`capo train` from the recipe to the folder it leaves behind, killed and resumed on the way."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capo_rl.records import read_metrics

QUICKSTART = str(Path(__file__).parents[1] / "recipes" / "quickstart.yaml")
SHORT = ["--max_steps", "8", "--dataset_limit", "64", "--save_steps", "2"]


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "capo_rl.cli", "train", QUICKSTART, "--output_dir", str(folder), *SHORT, *options]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *options), capture_output=True, text=True)


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
    process = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= after):
        assert process.poll() is None, "the run was over before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
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


def test_problems_that_cannot_be_graded_are_dropped_and_counted(tmp_path):
    data = tmp_path / "train.jsonl"
    rows = [{"problem": f"Compute {i}+1 mod 10.\n", "answer": str((i + 1) % 10)} for i in range(10)]
    data.write_text("\n".join(json.dumps(row) for row in [*rows, {"problem": "Compute 1+1 mod 10.\n", "answer": "x^"}]))
    done = run(tmp_path / "run", "--dataset_name", str(data), "--max_steps", "2")
    assert done.returncode == 0, done.stderr
    assert "left out 1 problems whose gold answer can't be parsed" in done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["dropped"] == {"ungradable": 1, "too_long": 0}
