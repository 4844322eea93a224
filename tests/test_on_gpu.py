"""The benchmarks for a GPU run from end to end on the CPU, so that a lent hour is not spent on a typing error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from capo_rl.curvature.kernels import triton

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "on_gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_rehearsal_writes_what_a_gpu_would(tmp_path):
    done = run("--rehearse", "--out", str(tmp_path), "--stages", "kernels", "step")
    assert done.returncode == 0, done.stderr
    kernels, step = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("kernels", "step"))
    assert kernels["complete"] and step["complete"]
    (shape,) = kernels["shapes"].values()
    for what in ("shifts", "update"):
        assert {"plain", "materialised, moments in dicts"} < shape[what]["forms"].keys()
        if triton:
            assert all(apart["over_the_largest"] < 1e-5 for apart in shape[what]["fused_against_plain"].values())
            assert all(tile["seconds"] > 0 for tile in shape[what]["tiles"])
    for model in step["models"].values():
        modes = list(model["modes"].values())
        assert [row["median"]["plain steps"]["seconds"] > 0 for row in modes] == [True] * 6
        assert [row["share_of_curvature"] > 0 for row in modes] == [False, False, True, True, True, True]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_stage_without_time_says_what_it_left_out(tmp_path):
    done = run("--rehearse", "--out", str(tmp_path), "--stages", "kernels", "--seconds", "0")
    assert done.returncode == 0, done.stderr
    kernels = json.loads((tmp_path / "kernels.json").read_text())
    assert kernels["left_out"] == ["tiny"] and not kernels["complete"]


def test_a_stage_that_fails_is_one_line_and_an_exit_status(tmp_path):
    (tmp_path / "kernels.json").mkdir()  # a folder, where a file is to be written
    done = run("--rehearse", "--out", str(tmp_path), "--stages", "kernels", "step", "--seconds", "0")
    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stderr.splitlines() if "failed" in line] == ["stage kernels failed"]
    assert (tmp_path / "step.json").is_file()
