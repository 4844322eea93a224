"""Training on the completions of a server whose weights lag behind, against completions of the trainer's own.

    python experiments/lagging_server.py [results/vllm]

The quickstart at its learning rate, 5e-4, where GRPO collapses, with TRL's `vllm_mode: server` and its correction as it
is by default (`sequence_mask`, masked above 3); the server is the tests' (`tests/vllm_server.py`), which needs no GPU.
A lag of n: it generates with the weights of n updates ago. Writes a file an arm, a column for each figure.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from capo_rl.runs.models import load_model  # noqa: E402
from capo_rl.runs.records import versions  # noqa: E402
from capo_rl.settings.recipe import read_recipe  # noqa: E402
from capo_rl.trainers.train import make_trainer  # noqa: E402
from vllm_server import Server, without_cuda  # noqa: E402

STEPS = 40
LAGS = (None, 0, 4, 16)  # None is generation by the trainer itself
METHODS: dict[str, dict[str, Any]] = {
    "mask with the share": {"capo_mode": "mask"},
    "default": {"capo_mode": "trust_region"},
}
FIGURES = (
    "reward",
    "capo/rejection_rate",
    "capo/share",
    "capo/scale",
    "capo/kl/measured",
    "capo/steps_skipped",
    "capo/unscored_tokens",
    "sampling/sampling_logp_difference/mean",
    "sampling/importance_sampling_ratio/min",
    "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/max",
)


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for method, fields in METHODS.items():
        for lag in LAGS:
            name = f"{method}, {'own generation' if lag is None else f'lag {lag}'}"
            path = out / (name.replace(", ", "-").replace(" ", "-") + ".json")
            if path.exists():
                continue
            start = time.perf_counter()
            log = run(fields, lag)
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
            columns = {
                each: [short(row.get(each)) for row in log] for each in FIGURES if any(each in row for row in log)
            }
            lines = ",\n".join(f"  {json.dumps(each)}: {json.dumps(values)}" for each, values in columns.items())
            about = {"arm": name, "method": method, "lag": lag, "versions": versions()}
            path.write_text(f'{json.dumps(about)[:-1]}, "by_step": {{\n{lines}\n}}}}\n')


def run(fields: dict[str, Any], lag: int | None) -> list[dict[str, float]]:
    """What each step logged."""
    server = None if lag is None else Server(load_model("embedded"), lag)
    with tempfile.TemporaryDirectory() as folder, without_cuda(), server or nullcontext():
        asked = {"max_steps": STEPS, "save_strategy": "no", "disable_tqdm": True, "output_dir": folder} | fields
        asked |= {} if server is None else server.settings()
        overrides = [part for name, value in asked.items() for part in (f"--{name}", str(value))]
        trainer, _ = make_trainer(read_recipe("quickstart", overrides))
        trainer.train()
        return [entry for entry in trainer.state.log_history if "reward" in entry]


def short(value: float | None) -> float | None:
    """Three digits; nothing where there is no number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.3g}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "results" / "vllm")
