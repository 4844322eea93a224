"""The same run in one process and in several: the same verdicts, shifts, moments, figures and weights."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import warm
from capo_rl.runs.saved_state import STATE_FILE

OPEN = {"capo_fisher_threshold": None, "capo_hessian_low": None, "capo_hessian_high": None}
SOME = {"capo_fisher_threshold": 0.01, "capo_hessian_low": -0.2, "capo_hessian_high": 0.2}
FSDP2 = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


def zero(stage: int) -> dict:
    """DeepSpeed's settings for a stage of ZeRO."""
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,
        **dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"),
    }


def run(folder: Path, processes: int, **settings) -> list[dict]:
    """What each process of a run writes."""
    name = f"on-{processes}"
    launch(folder, processes, [{"name": name} | settings])
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(processes)]


def launch(folder: Path, processes: int, runs: list[dict]) -> None:
    folder.mkdir(exist_ok=True)
    warm.launch(processes, [str(Path(__file__).parent / "many_processes.py"), str(folder), json.dumps(runs)])


def check_equal(one: dict, several: list[dict]) -> None:
    """Up to the order of float32 sums; verdicts and counts exactly."""
    verdicts = {key: value for each in several for key, value in each["verdicts"].items()}
    assert verdicts.keys() == one["verdicts"].keys()
    rejected = 0
    for key, (keep, m_f) in one["verdicts"].items():
        assert verdicts[key][0] == keep
        rejected += keep.count(False)
        assert verdicts[key][1] == pytest.approx(m_f, rel=1e-3, abs=1e-9)
    assert rejected
    if len(several) > 1:
        assert all(step["capo/bytes"] > 0 for step in several[0]["figures"] if "capo/seconds" in step)
    for name in ("p", "q"):
        for each in several:
            assert torch.equal(each["moments"][name], several[0]["moments"][name])
        torch.testing.assert_close(several[0]["moments"][name], one["moments"][name], rtol=1e-3, atol=1e-6)
    for name, weight in several[0]["weights"].items():
        torch.testing.assert_close(weight, one["weights"][name], rtol=1e-4, atol=1e-5)
    for other in several[1:]:
        for mine, theirs in zip(several[0]["figures"], other["figures"], strict=True):
            assert without_times(mine) == pytest.approx(without_times(theirs), rel=0, abs=0, nan_ok=True)
    for mine, theirs in zip(one["figures"], several[0]["figures"], strict=True):
        assert smooth(mine) == pytest.approx(smooth(theirs), rel=1e-3, abs=1e-9, nan_ok=True)


def without_times(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if not name.endswith(("seconds", "bytes"))}


def smooth(figures: dict[str, float]) -> dict[str, float]:
    """The figures that follow a small change of what they are made from, and so don't depend on the order of sums.

    A rank correlation doesn't: completions that begin alike have tokens of equal KL, whose ranks are rounding's.
    """
    return {name: value for name, value in without_times(figures).items() if name != "capo/kl/rank_correlation"}


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_ddp_is_one_process(tmp_path, loss_type):
    settings = SOME | {"loss_type": loss_type, "capo_share": loss_type == "grpo"}
    (one,) = run(tmp_path, 1, **settings)
    check_equal(one, run(tmp_path, 2, **settings))
    check_equal(one, run(tmp_path, 4, **settings))
    shares = [step["capo/share"] for step in one["figures"] if "capo/share" in step]
    assert loss_type != "grpo" or 0 < min(shares) < 1


def test_the_default_is_one_process_too(tmp_path):
    settings = SOME | {"capo_mode": "trust_region", "capo_watch": True, "capo_kl_start": 1.0, "capo_kl_budget": 0.1}
    (one,) = run(tmp_path, 1, **settings)
    check_equal(one, run(tmp_path, 2, **settings))
    assert min(step["capo/scale"] for step in one["figures"] if "capo/scale" in step) < 1
    assert min(step["capo/kl/fraction"] for step in one["figures"] if "capo/kl/fraction" in step) < 1


def test_fsdp2_is_one_process_and_never_gathers_the_head(tmp_path):
    (one,) = run(tmp_path, 1, max_steps=3, **SOME)
    several = run(tmp_path, 2, max_steps=3, **SOME, **FSDP2)
    assert all(each["sharded_head"] for each in several)
    check_equal(one, several)


@pytest.mark.skipif(not find_spec("deepspeed"), reason="needs DeepSpeed: docs/scaling.md has how it installs on a CPU")
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_is_one_process(tmp_path, stage):
    (one,) = run(tmp_path, 1, max_steps=3, **SOME)
    several = run(tmp_path, 2, max_steps=3, use_cpu=False, deepspeed=zero(stage), **SOME)
    assert all(each["sharded_head"] == (stage == 3) for each in several)
    check_equal(one, several)


@pytest.mark.parametrize("control", ["copy", "learning_rate"])
def test_a_kl_budget_takes_the_same_share_of_each_step_in_every_process(tmp_path, control):
    settings = {"capo_kl_budget": 1e-3, "capo_kl_control": control, "capo_kl_start": 1.0, "max_steps": 3, **OPEN}
    one, other = run(tmp_path, 2, **settings)
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name])
    fractions = [step["capo/kl/fraction"] for step in one["figures"] if "capo/kl/fraction" in step]
    assert fractions == [step["capo/kl/fraction"] for step in other["figures"] if "capo/kl/fraction" in step]
    assert len(fractions) == 3
    assert min(fractions) < 1
    assert not any(math.isnan(fraction) for fraction in fractions)


@pytest.mark.parametrize("control", ["copy", "optimizer"])
def test_a_kl_budget_takes_the_same_share_of_each_step_where_weights_are_sharded(tmp_path, control):
    """A module whose weights stay together after a forward pass must not answer with those from before a way back."""
    settings = {"capo_kl_budget": 1e-3, "capo_kl_control": control, "max_steps": 3, **OPEN}
    whole = run(tmp_path, 2, **settings)
    sharded = run(tmp_path, 2, **settings, **FSDP2)
    assert all(each["sharded_head"] for each in sharded)
    names = ("capo/kl/proposed", "capo/kl/measured", "capo/kl/fraction")
    figures = [
        [step[name] for step in each["figures"] for name in names if name in step] for each in (*whole, *sharded)
    ]
    assert len(figures[0]) == 9
    assert figures[0] == figures[1]
    assert figures[2] == figures[3]
    assert figures[2] == pytest.approx(figures[0], rel=1e-3)
    assert min(figures[0][2::3]) < 1
    for name, weight in whole[0]["weights"].items():
        torch.testing.assert_close(sharded[0]["weights"][name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("engine", [{}, FSDP2], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("norm", [{"max_grad_norm": 1.0}, {"max_grad_norm": 0.0, "blind": True}], ids=str)
def test_a_loss_of_one_process_that_is_not_finite_skips_the_step_in_all(tmp_path, engine, norm):
    several = run(tmp_path, 2, max_steps=3, poisoned=1, **norm, **SOME, **engine)
    for each in several:
        skipped = [step["capo/steps_skipped/nonfinite"] for step in each["figures"] if "capo/completions" in step]
        assert skipped == [0, 1, 1]
        assert all(tensor.isfinite().all() for tensor in each["moments"].values() if isinstance(tensor, torch.Tensor))
    assert all(weight.isfinite().all() for weight in several[0]["weights"].values())


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, before, after):
    saves = {"save_strategy": "steps", "save_steps": 3}
    (whole,) = run(tmp_path / "whole", 1, **SOME)
    folder = tmp_path / "resumed"
    run(folder, before, max_steps=3, **saves, **SOME)
    checkpoint = str(folder / "checkpoint-3")
    resumed = run(folder, after, resume_from_checkpoint=checkpoint, **saves, **SOME)
    # The learning rate is constant and completions depend on the step alone, so the steps are those of one long run.
    verdicts = {key: value for key, value in whole["verdicts"].items() if key[0] >= 3}
    check_equal(whole | {"verdicts": verdicts, "figures": whole["figures"][6:]}, resumed)


@pytest.mark.parametrize("engine", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_moments_that_are_spread_over_processes_train_the_same_weights(tmp_path, engine):
    """To the bit, in half the memory; a checkpoint is the same file, and a run goes on from it."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **SOME, **engine}
    names = ("whole", "spread", "resumed")
    whole, spread, resumed = ({"name": name, "capo_shard_moments": name != "whole", **settings} for name in names)
    folders = {"whole": tmp_path / "whole", "spread": tmp_path / "spread", "resumed": tmp_path / "spread"}
    launch(folders["whole"], 2, [whole])
    launch(folders["spread"], 2, [spread])
    saved = [(folders[name] / "checkpoint-2" / STATE_FILE).read_bytes() for name in ("whole", "spread")]
    assert saved[0] == saved[1]
    launch(folders["resumed"], 2, [resumed | {"resume_from_checkpoint": str(folders["spread"] / "checkpoint-2")}])
    for rank in range(2):
        one, *others = (torch.load(folders[name] / f"{name}-{rank}.pt", weights_only=True) for name in names)
        for other in others:
            for part in ("weights", "moments"):
                assert one[part].keys() == other[part].keys()
                assert all(torch.equal(each, other[part][name]) for name, each in one[part].items())
            for key, (keep, m_f) in other["verdicts"].items():
                assert one["verdicts"][key][0] == keep
                assert m_f == pytest.approx(one["verdicts"][key][1], rel=1e-4, abs=1e-12)
        assert one["verdicts"].keys() == others[0]["verdicts"].keys()
        assert not all(all(keep) for keep, _ in one["verdicts"].values())
        rows, width = one["moments"]["p"].shape
        assert one["held"] == 2 * (rows + 1) * width * 4
        assert all(other["held"] == 2 * ((rows + 1 - rank) // 2 + 1) * width * 4 for other in others)
