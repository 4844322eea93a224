"""Two processes, each with half of the batch: what one decides, the other must decide too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

OPEN = {"capo_fisher_threshold": None, "capo_hessian_low": None, "capo_hessian_high": None}


def two_processes(folder: Path, **settings) -> list[dict]:
    """What both processes of a run write."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--redirects=0"]
    done = subprocess.run(
        [*command, str(here / "two_processes.py"), str(folder), json.dumps(settings)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(here), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("control", ["copy", "learning_rate"])
def test_a_kl_budget_takes_the_same_share_of_each_step_in_every_process(tmp_path, control):
    one, other = two_processes(tmp_path, capo_kl_budget=1e-3, capo_kl_control=control, max_steps=3, **OPEN)
    assert (one["rank"], other["rank"]) == (0, 1)
    assert one["weights"] == other["weights"]
    shared = ("capo/kl/measured", "capo/kl/fraction")
    kl = [[{name: step[name] for name in shared if name in step} for step in each["kl"]] for each in (one, other)]
    assert kl[0] == kl[1]
    fractions = [step["capo/kl/fraction"] for step in kl[0] if "capo/kl/fraction" in step]
    assert len(fractions) == 3
    assert min(fractions) < 1
