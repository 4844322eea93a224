"""`capo doctor` says of dead runs that they are dead, of living ones that they live, of other files what is wrong."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from trl import GRPOConfig, GRPOTrainer

from capo_rl import CAPOConfig
from capo_rl.cli import main
from capo_rl.pages.doctor import FIGURES, diagnose
from capo_rl.pages.environment import environment
from capo_rl.pages.run_log import DoctorError, read_log
from capo_rl.planning.defaults import KL_BUDGET
from capo_rl.runs.records import write_metrics
from conftest import ROOT, SETTINGS

RESULTS = ROOT / "results"
DEAD = RESULTS / "range" / "grpo-lr-1e-3" / "11.json"
ALIVE = RESULTS / "range" / "default-lr-1e-2" / "11.json"


def history(path: Path = DEAD) -> list[dict]:
    """The steps of a committed run, as a stock trainer logs them."""
    run = json.loads(path.read_text(encoding="utf-8"))["curves"]
    names = ("step", "reward", "entropy", "grad_norm")
    return [
        dict(zip(names, row, strict=True)) | {"learning_rate": 1e-3, "completions/mean_length": 20.0}
        for row in zip(*(run[name] for name in names), strict=True)
    ]


def trainer_state(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "trainer_state.json"
    file.write_text(json.dumps({"global_step": rows[-1]["step"] if rows else 0, "log_history": rows}))
    return file


# ---- what it says ------------------------------------------------------------------------------------------------


def test_a_dead_run_is_told_with_its_step_what_moved_and_what_to_try(capsys):
    assert main(["doctor", str(DEAD)]) == 1
    said = capsys.readouterr().out
    assert "COLLAPSED at step 21 (150 logged steps" in said  # the step after index 20 of `statistics.collapsed`
    assert "What moved first: KL of the updates from step 11" in said
    assert "35 of 150 above 5.0e-03 (the default trust region's; it had none)" in said
    assert "\n-capo_mode: monitor\n+capo_mode: trust_region" in said


def test_a_living_run_is_held_against_its_own_budget(capsys):
    assert main(["doctor", str(ALIVE)]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[1].startswith("ALIVE (150 logged steps")
    assert "0 of 150 above 5.0e-03 (its budget)" in said
    assert "Try:" not in said


def test_a_run_of_another_trainer_is_offered_this_one(tmp_path):
    diagnosis = diagnose(read_log(trainer_state(tmp_path, history())))
    assert diagnosis.collapsed == 21
    assert [(c.name, c.before, c.after) for c in diagnosis.changes] == [("capo_mode", None, "trust_region")]
    assert "CAPOTrainer in place of" in str(diagnosis)
    assert "How far its updates went is not on record" in str(diagnosis)
    assert "Not logged: KL of the updates, m_F." in str(diagnosis)


@pytest.mark.parametrize(
    "settings",
    [
        {"capo_mode": "mask", "capo_soft": True},
        {"capo_mode": "mask", "capo_penalty": 1.0, "capo_kl_budget": 1e-3, "capo_kl_control": "copy"},
        {"capo_mode": "off"},
        {"capo_kl_sample": 0.5},
        {"capo_kl_control": "copy", "capo_kl_sample": 1.0},
    ],
)
def test_what_it_would_try_are_settings_that_can_be_had(tmp_path, settings):
    CAPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True, **settings)
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, history())))
    (tmp_path / "run.json").write_text(json.dumps({"settings": settings}))
    changes = diagnose(read_log(tmp_path)).changes
    assert changes and all(change.before != change.after for change in changes)
    for change in changes:
        settings.pop(change.name, None)
        settings |= {change.name: change.after} if change.after is not None else {}
    tried = CAPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True, **settings)
    assert tried.capo_mode == "trust_region" and tried.kl_budget <= KL_BUDGET


def test_a_run_that_the_schedule_holds_back_is_told_a_higher_rate():
    (change,) = diagnose(read_log(RESULTS / "range" / "default-lr-1e-4" / "11.json")).changes
    assert (change.name, change.before, change.after) == ("learning_rate", 1e-4, 3e-4)


def test_a_run_that_has_hardly_started_is_told_nothing_of_its_rate():
    log = read_log(RESULTS / "range" / "default-lr-1e-4" / "11.json")
    assert not diagnose(replace(log, entries=log.entries[:30])).changes


def test_a_dead_run_with_short_updates_is_not_blamed_on_them(tmp_path):
    rows = [row | {"capo/kl/measured": 1e-6} for row in history()]
    diagnosis = diagnose(read_log(trainer_state(tmp_path, rows)))
    assert diagnosis.collapsed and not diagnosis.changes
    assert "look at the reward function" in str(diagnosis)


def test_a_fall_that_the_smoothed_curve_has_not_seen_yet_is_told(tmp_path):
    rows = [{"step": i, "reward": 0.6 if i <= 40 else 0.0} for i in range(1, 46)]
    diagnosis = diagnose(read_log(trainer_state(tmp_path, rows)))
    assert diagnosis.collapsed is None
    assert "It may be dying: its last 7 average" in str(diagnosis)


@pytest.mark.parametrize(
    "settings", [{"capo_kl_budget": "x", "capo_kl_sample": [1]}, {"capo_mode": "\x1b[31mred"}, [1]]
)
def test_settings_that_were_tampered_with_do_no_harm(tmp_path, settings, capsys):
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, history())))
    (tmp_path / "run.json").write_text(json.dumps({"settings": settings}))
    assert main(["doctor", str(tmp_path)]) == 1
    assert "\x1b" not in capsys.readouterr().out


def test_gradients_that_were_no_numbers_are_counted(tmp_path):
    rows = history()
    rows[29]["grad_norm"] = float("nan")  # as json writes it, and transformers logs it
    assert "not finite at 1 logged steps, first at 30" in str(diagnose(read_log(trainer_state(tmp_path, rows))))


def test_what_our_own_metrics_have_as_null_was_no_number(tmp_path):
    rows = history()
    rows[29] |= {"grad_norm": math.nan, "loss": math.inf}
    write_metrics(tmp_path / "metrics.jsonl", rows)
    assert '"grad_norm": null' in (tmp_path / "metrics.jsonl").read_text()
    said = str(diagnose(read_log(tmp_path)))
    assert "The gradient was not finite at 1 logged steps, first at 30." in said
    assert "The loss was not finite at 1 logged steps, first at 30." in said
    rows[29] = history()[29] | {"reward": math.nan}
    write_metrics(tmp_path / "metrics.jsonl", rows)
    assert "The reward was not finite at 1 logged steps, first at 30." in str(diagnose(read_log(tmp_path)))


# ---- what it reads -----------------------------------------------------------------------------------------------


def test_a_stock_trainers_run_is_read_from_its_newest_checkpoint(build, tmp_path):
    settings = SETTINGS | {"max_steps": 12, "save_strategy": "steps", "save_steps": 6}
    trainer = build(GRPOTrainer, GRPOConfig, **settings)
    trainer.train()
    log = read_log(tmp_path / "run")
    assert log.source.parent.name == "checkpoint-12"
    assert [step for step, _ in log.series(["reward"])] == list(range(1, 13))
    logged = {name for entry in log.entries for name in entry}
    assert {figure.names[0] for figure in FIGURES[1:4]} <= logged  # TRL still has these names
    assert diagnose(log).sentences[0].startswith(("ALIVE (12", "COLLAPSED"))


def test_our_own_runs_are_read_with_their_settings(build, tmp_path):
    trainer = build(max_steps=12, capo_mode="trust_region", capo_watch=True)
    trainer.train()
    folder = tmp_path / "ours"
    folder.mkdir()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 13, "rew')
    (folder / "run.json").write_text(json.dumps({"settings": {"capo_kl_budget": 1e-3}}))
    log = read_log(folder)
    assert len(log.series(["reward"])) == 12  # without the half line of a run that goes on
    assert log.series(["capo/kl/measured"]) and log.series(["capo/batch/m_f"])
    assert "above 1.0e-03 (its budget)" in str(diagnose(log))


def test_the_eight_curves_of_the_docs_are_logged_and_the_filter_finds_them_alone(build):
    docs = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    section = docs.split("## The eight curves that matter")[1].split("## Everything")[0]
    named = re.findall(r"^\| `(\S+)` \|", section, re.MULTILINE)
    (pattern,) = re.findall(r"^    (\^.*\$)$", section, re.MULTILINE)
    trainer = build(max_steps=1, capo_mode="trust_region", capo_watch=True)
    trainer.train()
    logged = next(row for row in trainer.state.log_history if "reward" in row)
    assert len(named) == 8
    assert sorted(named) == sorted(name for name in logged if re.search(pattern, f"train/{name}"))


def test_exports_of_wandb_and_trackio_are_the_same_run(tmp_path):
    rows = history()
    charts, long, drawers = tmp_path / "wandb.csv", tmp_path / "wandb.jsonl", tmp_path / "trackio.jsonl"
    with charts.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Step", "lucky-1 - train/reward", "lucky-1 - train/reward__MIN", "lucky-1 - train/entropy"])
        for row in rows:
            writer.writerow([row["step"], row["reward"], 0, row["entropy"]])
    with long.open("w") as file:  # several rows a step, and a counter of their own
        for i, row in enumerate(rows):
            step = {"_step": 2 * i, "train/global_step": row["step"]}
            file.write(json.dumps(step | {"train/reward": row["reward"]}) + "\n")
            file.write(json.dumps(step | {"_step": 2 * i + 1, "train/entropy": row["entropy"]}) + "\n")
    with drawers.open("w") as file:
        for row in rows:
            inner = json.dumps({"train/reward": row["reward"], "train/entropy": row["entropy"]})
            file.write(json.dumps({"run_name": "a", "step": row["step"], "metrics": inner}) + "\n")
    wanted = read_log(trainer_state(tmp_path, rows))
    for path in (charts, long, drawers):
        log = read_log(path)
        assert log.series(["reward"]) == wanted.series(["reward"])
        assert log.series(["entropy"]) == wanted.series(["entropy"])
        assert diagnose(log).collapsed == 21


def test_tensorboard_events_are_read_where_tensorboard_is(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "runs" / "here")) as writer:
        for row in history():
            writer.add_scalar("train/reward", row["reward"], row["step"])
            writer.add_scalar("train/grad_norm", row["grad_norm"], row["step"])
    diagnosis = diagnose(read_log(tmp_path))
    assert diagnosis.collapsed == 21
    assert "gradient norm from step 11" in str(diagnosis)


def test_a_resumed_run_counts_each_step_once(tmp_path):
    rows = history()
    log = read_log(trainer_state(tmp_path, [*rows[:60], *rows[40:]]))
    assert [step for step, _ in log.series(["reward"])] == list(range(1, 151))


def _folder(path):
    path.mkdir()
    (path / "other.txt").write_text("x")


def _text(content):
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _rows(rows):
    return _text("\n".join(json.dumps(row) for row in rows))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("nothing", lambda path: None, "no such file or folder; give the folder of a run"),
        ("folder", _folder, "no metrics there"),
        (
            "trainer_state.json",
            _text('{"global_step": 3, "log_history": [{"st'),
            "not whole JSON .* earlier checkpoint",
        ),
        ("other.json", _text('{"a": 1}'), "JSON, but not a trainer_state.json"),
        ("list.json", _text("[1, 2]"), "JSON, but not a trainer_state.json"),
        ("model.bin", _text(b"\x80\x04"), "not a format that is read here"),
        ("x.jsonl", _text(b"\xff\xfe\x00"), "can't be read"),
        ("deep.json", _text("[" * 200_000), "can't be read|not whole JSON"),
        ("x.jsonl", _text('{"step": 1}\nxx\n{"step": 2}'), "line 2 is not JSON .*; remove it"),
        ("x.jsonl", _text('[1]\n{"step": 2}'), "line 1 is no JSON object"),
        ("empty.jsonl", _text(""), "no reward is logged there"),
        ("cut.jsonl", _text('{"step": 1, "rew'), "no reward is logged there"),
        ("x.jsonl", _rows([{"step": 1, "loss": 2.0}]), r"no reward is logged there \('loss'\)"),
        ("x.jsonl", _rows(history()[:1]), "1 logged step with a reward, and a collapse shows in 11 or more"),
        (
            "x.jsonl",
            _rows([{"step": i, "reward": 0.0} for i in range(20)]),
            "no reward is above zero in 20 logged steps",
        ),
        ("x.jsonl", _rows([{"step": i, "reward": i - 5} for i in range(20)]), "below zero .*log an accuracy beside it"),
        ("x.csv", _text("Step,a - reward,b - reward\n1,2,3\n"), r"2 runs in one export \('a', 'b'\); export one"),
        ("x.jsonl", _rows([{"run_name": n, "step": 1, "reward": 1} for n in "ab"]), "2 runs in one export"),
    ],
)
def test_what_cannot_be_read_is_told_in_a_sentence(tmp_path, name, write, message, capsys):
    write(tmp_path / name)
    with pytest.raises(DoctorError, match=message) as error:
        diagnose(read_log(tmp_path / name))
    assert "\n" not in str(error.value)
    assert main(["doctor", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.startswith("capo: error: ")


def test_an_accuracy_is_judged_where_the_reward_goes_below_zero(tmp_path):
    rows = [
        {"step": row["step"], "reward": row["reward"] - 1, "rewards/accuracy_reward/mean": row["reward"]}
        for row in history()
    ]
    diagnosis = diagnose(read_log(trainer_state(tmp_path, rows)))
    assert diagnosis.collapsed == 21
    assert "the smoothed rewards/accuracy_reward/mean" in str(diagnosis)


def test_events_without_tensorboard_name_the_package(tmp_path, monkeypatch):
    (tmp_path / "events.out.tfevents.1.here").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DoctorError, match="pip install tensorboard"):
        read_log(tmp_path)


# ---- the command -------------------------------------------------------------------------------------------------


def test_without_a_run_it_prints_versions_and_hardware(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "capo-rl: " in said and "cores" in said
    assert environment().keys() >= {"python", "torch", "trl", "system", "cpu", "gpu"}


def test_it_waits_for_nothing_heavy():
    code = f"from capo_rl.cli import main; status = main(['doctor', {str(DEAD)!r}]); import sys\n"
    check = "sys.exit(status + 4 * any(x in sys.modules for x in ('torch', 'transformers', 'trl', 'matplotlib')))"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr


def test_a_reader_that_has_gone_ends_the_command():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-u", "-m", "capo_rl.cli", "doctor"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.stderr, done.returncode) == (b"", 128 + signal.SIGPIPE)
