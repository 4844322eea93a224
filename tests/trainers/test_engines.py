"""Every mode on every engine: the step taken is that of one process."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from test_distributed import FSDP2, SOME, launch, zero

from conftest import make_model

BUDGET = {"capo_kl_budget": 0.1, "capo_kl_start": 1.0}
# A mean over sequences: that of dapo depends on how the step is divided (docs/algorithm.md, "Denominators").
COMMON = {"max_steps": 3, "loss_type": "grpo", "capo_kl_sample": 1.0, **SOME}
MODES = {
    "monitor": {"capo_mode": "monitor"},
    "mask": {"capo_mode": "mask"},
    "mask, share": {"capo_mode": "mask", "capo_share": True},
    "shorten": {"capo_mode": "shorten"},
    "default": {"capo_mode": "trust_region", **BUDGET},
    "default, watched": {"capo_mode": "trust_region", "capo_watch": True, **BUDGET},
    "slow start": {"capo_mode": "trust_region", **BUDGET, "capo_kl_start": 1e-2},  # nothing has to be taken back
    "copy": {"capo_mode": "trust_region", "capo_kl_control": "copy", **BUDGET},
    "optimizer": {"capo_mode": "trust_region", "capo_kl_control": "optimizer", **BUDGET},
}
UNWATCHED = ("default", "slow start", "copy", "optimizer")  # where nothing is predicted
# What an engine changes, and by how much of the step it may differ: half precision rounds by the shapes of a batch.
ENGINES = {
    "ddp": (2, {}, 1e-3),
    "accumulation": (1, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 1e-3),
    "two uses, ddp": (2, {"num_iterations": 2}, 1e-3),
    "bf16, ddp": (2, {"bf16": True}, 0.2),
    # float16 is made on CPUs by many_processes.py, whose scaler leaves the first step out
    "fp16, ddp": (2, {"fp16": True}, 0.2),
    "LoRA, ddp": (2, {"lora": True}, 1e-3),
    "fsdp2": (2, FSDP2, 1e-3),
}
# DeepSpeed takes its step inside the backward pass: what it can't do is refused (docs/refusals.md).
ZERO = {f"zero{stage}": (2, {"use_cpu": False, "deepspeed": zero(stage)}, 1e-3) for stage in (2, 3)}
BY_DEEPSPEED = ("monitor", "mask", "slow start")
ALONE = {
    "plain": {},
    "two uses": {"num_iterations": 2},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "LoRA": {"lora": True},
    "without the first step": {"poisoned": 0},
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """What three steps of a mode end with, on an engine or alone; one start for each kind."""
    folder = tmp_path_factory.mktemp("engines")
    alone = {name: (1, settings, 0.0) for name, settings in ALONE.items()}
    places = ENGINES | ZERO | alone
    started = set()

    def kind(engine: str) -> tuple[int, str]:
        processes, settings, _ = places[engine]
        return processes, engine if settings.keys() & {"fsdp", "deepspeed"} else ""

    def result(engine: str, mode: str) -> dict[str, Any]:
        if kind(engine) not in started:
            started.add(kind(engine))
            runs = [
                {"name": f"{each}: {one}", **COMMON, **MODES[one], **places[each][1]}
                for each in places
                if kind(each) == kind(engine)
                for one in (BY_DEEPSPEED if each in ZERO else MODES)
            ]
            launch(folder, kind(engine)[0], runs)
        return torch.load(folder / f"{engine}: {mode}-0.pt", weights_only=True)

    return result


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_step_is_that_of_one_process(steps, engine, mode):
    assert difference(steps, engine, mode, alone(engine)) <= ENGINES[engine][2]


@pytest.mark.skipif(not find_spec("deepspeed"), reason="needs DeepSpeed: docs/scaling.md has how it installs on a CPU")
@pytest.mark.parametrize("mode", BY_DEEPSPEED)
@pytest.mark.parametrize("engine", ZERO)
def test_the_step_of_deepspeed_is_that_of_one_process(steps, engine, mode):
    assert difference(steps, engine, mode, alone(engine)) <= ZERO[engine][2]


@pytest.mark.parametrize("engine", ["fp16", "fp16, ddp"])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_a_loss_scaler_leaves_out_was_none(steps, engine, mode):
    """The optimizer and its model have taken the steps of a float32 run whose first loss was NaN."""
    moments, left_out = steps(engine, mode)["moments"], "without the first step"
    if mode == "monitor":  # which leaves a loss of NaN to TRL
        assert moments["steps"] == 2
    else:
        assert ("steps" in moments) == (mode not in UNWATCHED)
        if moments:
            assert moments["steps"] == steps(left_out, mode)["moments"]["steps"] < 3
        assert difference(steps, engine, mode, left_out) <= 0.2


def alone(engine: str) -> str:
    """The run in one process that an engine's is to equal."""
    return next((name for name in ALONE if engine.startswith(name)), "plain")


def difference(steps, engine: str, mode: str, expected: str) -> float:
    """How far the weights are from those of one process, over how far these have gone."""
    one, several = steps(expected, mode)["weights"], steps(engine, mode)["weights"]
    start = {name: weight.float() for name, weight in make_model().state_dict().items()}
    assert one.keys() == several.keys()
    trained = [name for name in one if "lora" in name] or [name for name in one if name in start]
    moved, apart = [], []
    for name in trained:
        moved.append((one[name] - start[name]).flatten() if name in start else one[name].flatten())
        apart.append((several[name] - one[name]).flatten())
    length = float(torch.cat(moved).norm())
    assert length > 0
    return float(torch.cat(apart).norm()) / length
