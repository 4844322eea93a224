"""Faults, injected: at most what came after the last checkpoint is lost, and nothing hangs (docs/scaling.md)."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import TrainerCallback

import warm
from capo_rl.runs.records import read_metrics
from capo_rl.trainers.checkpoints import (
    CheckpointError,
    FiniteWeights,
    StopWhenTold,
    WholeCheckpoints,
    checkpoints,
    damage_of,
    resume_point,
)
from conftest import ROOT

QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
CAPO = ("-m", "capo_rl.cli")
SAVED = {"save_strategy": "steps", "save_steps": 1}
HANGS = 1200  # seconds: what takes longer hangs, on a machine with twenty other processes too


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


# ---- one process, the tiny model ---------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("model.safetensors", flip_a_bit, "is not what was written"),
        ("optimizer.pt", truncate, r"of the [\d,]+ bytes that were written"),
        ("capo_state.safetensors", Path.unlink, "is missing"),
        ("trainer_state.json", truncate, "bytes that were written"),
        ("manifest.json", truncate, "is missing or not JSON"),
    ],
)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_offered(build, tmp_path, name, harm, message):
    build(WholeCheckpoints, max_steps=3, **SAVED).train()
    run = tmp_path / "run"
    assert resume_point(run) == str(run / "checkpoint-3")
    harm(run / "checkpoint-3" / name)
    with pytest.raises(CheckpointError, match=f"checkpoint-3/{name} .*{message}.*remove .*checkpoint-3 to go on from "):
        resume_point(run)
    harm(run / "checkpoint-2" / name)
    with pytest.raises(CheckpointError, match=r"checkpoint-3 and .*checkpoint-2 to go on from .*checkpoint-1, which"):
        resume_point(run)
    harm(run / "checkpoint-1" / name)
    with pytest.raises(CheckpointError, match="to begin again: there is no other"):
        resume_point(run)


def test_a_run_without_a_checkpoint_begins(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    assert resume_point(tmp_path) is None


def test_old_checkpoints_go_when_the_new_one_is_there(build, tmp_path):
    build(WholeCheckpoints, max_steps=4, save_total_limit=2, **SAVED).train()
    assert list(checkpoints(tmp_path / "run")) == [4, 3]
    assert not (tmp_path / "run" / ".unfinished").exists()


@pytest.mark.parametrize(
    ("error", "free", "raised"),
    [
        (OSError(28, "No space left on device"), 2**40, CheckpointError),
        (RuntimeError("unexpected pos 64 vs 0"), 0, CheckpointError),  # what torch says of a full disk
        (RuntimeError("a bug"), 2**40, RuntimeError),
    ],
    ids=str,
)
def test_a_checkpoint_that_fails_leaves_nothing_but_those_before(build, tmp_path, monkeypatch, error, free, raised):
    trainer = build(WholeCheckpoints, max_steps=3, save_total_limit=1, **SAVED)

    def fail(folder: str) -> None:
        if trainer.state.global_step == 2:
            raise error
        Path(folder, "scaler.pt").write_bytes(b"")

    trainer._save_scaler = fail  # weights, optimizer and step model are written already
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr("capo_rl.trainers.checkpoints.shutil.disk_usage", lambda path: usage)
    with pytest.raises(raised) as caught:
        trainer.train()
    assert type(caught.value) is raised
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == ["checkpoint-1"]
    assert resume_point(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_goes_on_as_if_nothing_had_happened(build, tmp_path, number):
    settings = {"max_steps": 6, "capo_fisher_threshold": 0.01, "num_iterations": 2}
    whole = build(WholeCheckpoints, **settings)
    whole.train()
    handler = signal.getsignal(number)
    seen = []

    def tell() -> None:
        os.kill(os.getpid(), number)
        seen.extend(signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT))

    stop = StopWhenTold()
    told = build(WholeCheckpoints, callbacks=[At(3, tell), stop], **settings)
    told.train()
    assert stop.status == 128 + number
    assert told.state.global_step == 3
    assert seen == [signal.SIG_DFL] * 2  # a second signal would end the process
    assert signal.getsignal(number) is handler
    resumed = build(WholeCheckpoints, **settings)
    resumed.train(resume_from_checkpoint=resume_point(tmp_path / "run"))
    expected = weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(resumed).items())


@pytest.mark.parametrize(
    ("only", "way"),
    [(False, "The same command goes on from .*checkpoint-2"), (True, "checkpoint-2 has weights and nothing to go on")],
)
def test_weights_that_are_not_finite_are_not_saved(build, tmp_path, only, way):
    settings = {"capo_mode": "monitor", "max_steps": 4, "save_only_model": only, **SAVED}
    trainer = build(WholeCheckpoints, callbacks=[FiniteWeights()], **settings)
    compute = trainer._compute_loss
    trainer._compute_loss = lambda *each: compute(*each) * (float("nan") if trainer.state.global_step == 2 else 1)
    with pytest.raises(CheckpointError, match=f"step 3 left weights that are not finite.*{way}"):
        trainer.train()
    assert list(checkpoints(tmp_path / "run")) == [2, 1]
    assert damage_of(tmp_path / "run" / "checkpoint-2") is None


# ---- `capo train` and torchrun, the quickstart's model -----------------------------------------------------------


def command(folder: Path, *options: str, processes: int = 1, program: tuple[str, ...] = CAPO) -> list[str]:
    size = ["--per_device_train_batch_size", str(16 // processes), "--max_steps", "8", "--dataset_limit", "64"]
    return [*program, "train", QUICKSTART, "--output_dir", str(folder), *size, "--save_steps", "2", *options]


def start(folder: Path, *options: str) -> warm.Process:
    return warm.Process(command(folder, *options))


def torchrun(folder: Path, *options: str) -> subprocess.Popen[str]:
    """Two processes, and the launcher that watches over them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    return subprocess.Popen(
        [*launcher, *command(folder, *options, processes=2)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def wait_for_steps(process: subprocess.Popen[str] | warm.Process, folder: Path, count: int) -> None:
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= count):
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.02)


def worker(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    children = psutil.Process(launcher.pid).children()
    (found,) = [child for child in children if child.environ().get("RANK") == str(rank)]
    return found


def ends_whole(folder: Path, processes: int = 1) -> None:
    """The newest checkpoint is whole, and the same command goes on from it to the end."""
    assert resume_point(folder) is not None
    warm.launch(processes, command(folder, processes=processes))
    assert next(iter(checkpoints(folder))) == 8
    assert (folder / "summary.json").exists()


def test_a_full_disk_ends_the_run_with_a_message_and_its_last_checkpoint(tmp_path):
    run = start(tmp_path / "run")
    wait_for_steps(run, tmp_path / "run", 3)
    megabyte = 2**20  # the weights have four; a limit on a file's size is what a full disk is, to one process
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (megabyte, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    errors = run.communicate(timeout=HANGS)[1]
    assert run.returncode == 2
    last = errors.strip().splitlines()[-1]
    assert last.startswith("capo: error: ")
    assert "checkpoint-4: not written" in last
    assert "goes on from" in last
    assert list(checkpoints(tmp_path / "run")) == [2]
    ends_whole(tmp_path / "run")


def test_sigterm_ends_a_run_with_a_checkpoint_and_status_143(tmp_path, record_property):
    run = start(tmp_path / "run", "--save_steps", "100")
    wait_for_steps(run, tmp_path / "run", 2)
    run.send_signal(signal.SIGTERM)
    start_of_wait = time.monotonic()
    errors = run.communicate(timeout=HANGS)[1]
    record_property("seconds", time.monotonic() - start_of_wait)
    assert run.returncode == 143, errors[-3000:]
    assert "told to stop" in errors
    (step,) = checkpoints(tmp_path / "run")
    assert 2 <= step < 8
    assert resume_point(tmp_path / "run") is not None
    assert not (tmp_path / "run" / "summary.json").exists()


def test_ctrl_c_ends_a_run_with_a_checkpoint_one_line_and_status_130(tmp_path):
    run = start(tmp_path / "run", "--save_steps", "100")
    wait_for_steps(run, tmp_path / "run", 2)
    run.send_signal(signal.SIGINT)
    errors = run.communicate(timeout=HANGS)[1]
    assert run.returncode == 130, errors[-3000:]
    assert errors.count("told to stop") == 1 and "Traceback" not in errors
    assert len(checkpoints(tmp_path / "run")) == 1
    assert resume_point(tmp_path / "run") is not None


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(tmp_path):
    first = start(tmp_path / "run")
    wait_for_steps(first, tmp_path / "run", 1)
    first.send_signal(signal.SIGSTOP)  # or it is over before the other has started
    second = start(tmp_path / "run")
    refused = second.communicate(timeout=HANGS)[1]
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    assert (
        refused.strip()
        .splitlines()[-1]
        .startswith(f"capo: error: output_dir={tmp_path / 'run'}: process {first.pid} on ")
    )
    errors = first.communicate(timeout=HANGS)[1]
    assert first.returncode == 0, errors[-3000:]
    assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == list(range(1, 9))


def test_a_killed_process_ends_the_others_and_the_last_checkpoint_stays(tmp_path, record_property):
    run = torchrun(tmp_path / "run")
    wait_for_steps(run, tmp_path / "run", 3)
    worker(run, 1).send_signal(signal.SIGKILL)
    start_of_wait = time.monotonic()
    run.communicate(timeout=HANGS)
    record_property("seconds", time.monotonic() - start_of_wait)
    assert run.returncode != 0
    ends_whole(tmp_path / "run", processes=2)


def test_a_process_that_hangs_is_waited_for_no_longer_than_ddp_timeout(tmp_path, record_property):
    other, hanging = warm.start(2, command(tmp_path / "run", "--ddp_timeout", "5", processes=2))
    wait_for_steps(other, tmp_path / "run", 3)
    hanging.send_signal(signal.SIGSTOP)
    start_of_wait = time.monotonic()
    errors = other.communicate(timeout=HANGS)[1]  # without ddp_timeout on CPUs this takes 30 minutes
    record_property("seconds", time.monotonic() - start_of_wait)
    hanging.send_signal(signal.SIGKILL)
    hanging.communicate()
    assert other.returncode != 0
    assert "Timed out waiting 5000ms" in errors
    assert resume_point(tmp_path / "run") is not None


NOT_FINITE = """
from capo_rl.cli import main
from capo_rl.trainers.trl import CAPOTrainer

compute = CAPOTrainer._compute_loss
CAPOTrainer._compute_loss = lambda self, *each: compute(self, *each) * (
    float("nan") if self.state.global_step == 3 and self.accelerator.process_index == 1 else 1
)
raise SystemExit(main())
"""


def test_a_loss_of_one_process_that_is_not_finite_ends_all_with_the_last_checkpoint(tmp_path):
    (tmp_path / "not_finite.py").write_text(NOT_FINITE)
    program = (str(tmp_path / "not_finite.py"),)
    options = ("--capo_mode", "monitor", "--capo_kl_budget", "null")
    for run in warm.start(2, command(tmp_path / "run", *options, processes=2, program=program)):
        errors = run.communicate(timeout=HANGS)[1]
        assert run.returncode != 0
        assert "step 4 left weights that are not finite" in errors, errors[-3000:]
        assert "checkpoint-2" in errors
    assert list(checkpoints(tmp_path / "run")) == [2]
    assert resume_point(tmp_path / "run") is not None


def test_all_processes_stop_at_one_step_when_the_launcher_is_told(tmp_path, record_property):
    run = torchrun(tmp_path / "run", "--save_steps", "100")
    wait_for_steps(run, tmp_path / "run", 2)
    run.send_signal(signal.SIGTERM)
    start_of_wait = time.monotonic()
    errors = run.communicate(timeout=HANGS)[1]
    record_property("seconds", time.monotonic() - start_of_wait)
    assert run.returncode != 0
    assert errors.count("told to stop") == 2, errors[-3000:]
    (step,) = checkpoints(tmp_path / "run")
    assert errors.count(f"step {step} is in its checkpoint") == 2
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (tmp_path / "run").rglob("*.pth")}
    assert resume_point(tmp_path / "run") is not None
