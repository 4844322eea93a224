"""A run's folder: whose it is, what counts as a checkpoint, and what its metrics come to."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import pytest

from capo_rl.cli import main
from capo_rl.runs.plots import draw_comparison, draw_panels, draw_run
from capo_rl.runs.records import (
    RunFolderError,
    check_folder,
    last_checkpoint,
    read_metrics,
    sole_writer,
    start_run,
    summarize,
    write_json,
    write_metrics,
)

SETTINGS = {"learning_rate": 1e-4, "capo_fisher_threshold": math.inf, "betas": (0.9, 0.99)}


def test_a_run_may_go_on_in_its_own_folder_only(tmp_path):
    folder = tmp_path / "runs" / "a"
    check_folder(folder, SETTINGS)
    assert not folder.exists()  # an error that comes later must not leave a folder behind
    start_run(folder, SETTINGS)
    check_folder(folder, SETTINGS)
    with pytest.raises(RunFolderError, match=r"other settings \(learning_rate, seed\); choose another"):
        check_folder(folder, SETTINGS | {"learning_rate": 1e-3, "seed": 1})


def test_a_run_whose_folder_has_its_secrets_still_may_go_on(tmp_path):
    start_run(tmp_path, SETTINGS | {"hub_token": "abc"})  # as earlier versions wrote it
    check_folder(tmp_path, SETTINGS | {"hub_token": "(not shown)"})


@pytest.mark.parametrize(
    ("there", "asked", "same"),
    [
        ({}, {"capo_step": "adam"}, True),  # as runs of the time when `adam` was the default have it
        ({"capo_step": "adam"}, {}, True),
        ({"optim": "sgd"}, {"optim": "sgd", "capo_step": "sgd"}, True),
        ({"optim": "adafactor"}, {"optim": "adafactor", "capo_step": "adam"}, True),
        ({}, {"capo_step": "sgd"}, False),
        ({"optim": "sgd"}, {"optim": "sgd", "capo_step": "adam"}, False),
    ],
)
def test_a_step_model_is_the_same_named_or_not(tmp_path, there, asked, same):
    start_run(tmp_path, SETTINGS | there)
    if same:
        assert check_folder(tmp_path, SETTINGS | asked) is None
    else:
        with pytest.raises(RunFolderError, match=r"other settings \(capo_step\)"):
            check_folder(tmp_path, SETTINGS | asked)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match="not empty, and not a run of capo"):
        check_folder(tmp_path, SETTINGS)


def test_a_checkpoint_that_was_being_written_is_none(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, state in ((9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (11, '{"global_st'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_metrics_survive_a_killed_writer(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, [{"step": 1, "reward": 0.5, "capo/kl/measured": math.nan}])
    write_metrics(path, [{"step": 2, "reward": 1.0}, {"step": 2, "train_runtime": 3.0}], append=True)
    with path.open("a") as file:
        file.write('{"step": 3, "rew')
    assert read_metrics(tmp_path) == [{"step": 1, "reward": 0.5, "capo/kl/measured": None}, {"step": 2, "reward": 1.0}]
    assert all(json.loads(line) for line in path.read_text().splitlines()[:3])
    with pytest.raises(RunFolderError, match="no such file; give the folder of a run"):
        read_metrics(tmp_path / "elsewhere")


def test_a_json_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"kl": math.inf})
    assert json.loads(path.read_text()) == {"kl": None}
    with pytest.raises(TypeError):
        write_json(path, {1j: 1})
    assert json.loads(path.read_text()) == {"kl": None}


def test_a_summary_leaves_out_what_was_not_logged():
    steps = [{"step": i, "reward": 0.5, "seconds": 2.0, "capo/kl/measured": None} for i in range(1, 4)]
    summary = summarize([*steps, {"step": 4, "reward": 1.0, "seconds": 2.0, "capo/kl/measured": 0.25}])
    assert (summary["reward_first"], summary["reward_last"], summary["reward_best"]) == (0.5, 1.0, 1.0)
    assert (summary["seconds"], summary["kl_measured_max"]) == (8.0, 0.25)
    assert "rejection_rate" not in summary


def test_curves_are_drawn_of_any_run(tmp_path):
    off = [{"step": i, "reward": 0.1 * i, "grad_norm": 1.0} for i in range(5)]
    masked = [
        entry | {"capo/completions": 16 * i, "capo/batch/m_h": -0.1, "capo/batch/m_f": None, "capo/kl/measured": 1e-3}
        for i, entry in enumerate(off)
    ]
    for name, entries in (("off", off), ("masked", masked)):
        draw_run(entries, tmp_path / f"{name}.png", title=name)
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    draw_comparison({"GRPO": off, "CAPO": masked}, tmp_path / "both.png", title="both")
    assert (tmp_path / "both.png").stat().st_size > 10_000


def test_zeros_and_what_is_not_a_number_do_not_tear_a_logarithmic_axis(tmp_path):
    values = [0.0, 1e-3, 2e-3, None, math.nan, 1e-30, 3e-3, math.inf, 0.0]
    entries = [{"step": i, "reward": 0.5, "capo/kl/measured": value} for i, value in enumerate(values)]
    draw_run(entries, tmp_path / "run.svg", title="")
    whole, panel = tmp_path / "run.svg", draw_panels(entries, tmp_path, collapsed=6)["capo/kl/measured"]
    for drawn in (whole.read_text(), panel.read_text()):
        width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', drawn).groups())
        lines = re.findall(r'<path d="(M [^z"]+)" clip-path', drawn)
        points = [point for line in lines for point in re.findall(r"[ML] (\S+) (\S+)", line)]
        assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in points) and len(points) > 20
        assert "zero, or off the scale" in drawn and "10^{-30}" not in drawn
    # the three that the axis has no place for are marks on its edge, beside the legend's own
    assert len(re.findall(r"<use [^>]*fill: #0072b2", panel.read_text())) == 3 + 1


def test_an_axis_is_linear_where_nothing_is_above_zero(tmp_path):
    entries = [{"step": i, "reward": 0.5, "grad_norm": 0.0} for i in range(5)]
    draw_run(entries, tmp_path / "run.svg", title="")
    assert "zero, or off the scale" not in (tmp_path / "run.svg").read_text()


def test_metrics_without_a_training_step_are_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RunFolderError, match="no training step is logged in it"):
        read_metrics(tmp_path)
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "a.png")]) == 2
    assert not (tmp_path / "a.png").exists()


HOLDS = """
import sys
from capo_rl.runs.records import sole_writer
with sole_writer(sys.argv[1]):
    print("here", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_writer_until_its_process_is_gone(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout.readline() == b"here\n"
        with pytest.raises(RunFolderError, match=f"process {holder.pid} on .* is writing to it"), sole_writer(folder):
            pass
        holder.kill()
    with sole_writer(folder):
        check_folder(folder, SETTINGS)  # a lock that was left makes no run
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="can't be written to"), sole_writer(tmp_path / "file" / "run"):
        pass
