"""Every mode on every engine: the step taken is that of one process."""

from __future__ import annotations

import pytest
import torch

from conftest import make_model
from test_distributed import FSDP2, SOME, launch

BUDGET = {"capo_kl_budget": 0.1, "capo_kl_start": 1.0}
# A mean over sequences: that of dapo depends on how the step is divided (docs/algorithm.md, "Denominators").
COMMON = {"max_steps": 3, "loss_type": "grpo", "capo_kl_sample": 1.0, **SOME}
MODES = {
    "monitor": {"capo_mode": "monitor"},
    "mask": {"capo_mode": "mask"},
    "mask, share": {"capo_mode": "mask", "capo_share": True},
    "shorten": {"capo_mode": "shorten"},
    "default": {"capo_mode": "trust_region", **BUDGET},
    "copy": {"capo_mode": "trust_region", "capo_kl_control": "copy", **BUDGET},
    "optimizer": {"capo_mode": "trust_region", "capo_kl_control": "optimizer", **BUDGET},
}
# What an engine changes, and by how much of the step it may differ: half precision rounds by the shapes of a batch.
ENGINES = {
    "ddp": (2, {}, 1e-3),
    "accumulation": (1, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 1e-3),
    "two uses, ddp": (2, {"num_iterations": 2}, 1e-3),
    "bf16, ddp": (2, {"bf16": True}, 0.2),
    "LoRA, ddp": (2, {"lora": True}, 1e-3),
    "fsdp2": (2, FSDP2, 1e-3),
}
ALONE = {"plain": {}, "two uses": {"num_iterations": 2}, "bf16": {"bf16": True}, "LoRA": {"lora": True}}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The weights after three steps of every mode, on every engine and alone; one start for each kind of processes."""
    folder = tmp_path_factory.mktemp("engines")
    kinds: dict[tuple[int, bool], list[dict]] = {}
    alone = {name: (1, settings, 0.0) for name, settings in ALONE.items()}
    for engine, (processes, settings, _) in (ENGINES | alone).items():
        for mode, choice in MODES.items():
            asked = {"name": f"{engine}: {mode}", **COMMON, **choice, **settings}
            kinds.setdefault((processes, "fsdp" in settings), []).append(asked)
    for (processes, _), runs in kinds.items():
        launch(folder, processes, runs)

    def weights(engine: str, mode: str) -> dict[str, torch.Tensor]:
        return torch.load(folder / f"{engine}: {mode}-0.pt", weights_only=True)["weights"]

    return weights


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_step_is_that_of_one_process(steps, engine, mode):
    alone = next((name for name in ALONE if engine.startswith(name)), "plain")
    one, several = steps(alone, mode), steps(engine, mode)
    start = {name: weight.float() for name, weight in make_model().state_dict().items()}
    assert one.keys() == several.keys()
    trained = [name for name in one if "lora" in name] or [name for name in one if name in start]
    moved, apart = [], []
    for name in trained:
        moved.append((one[name] - start[name]).flatten() if name in start else one[name].flatten())
        apart.append((several[name] - one[name]).flatten())
    length, difference = float(torch.cat(moved).norm()), float(torch.cat(apart).norm())
    assert length > 0
    assert difference / length <= ENGINES[engine][2]
