"""A training run of verl's workers with CAPO, as far as a CPU goes: each step's metrics, as verl would log them.

    python benchmarks/verl_on_cpu.py --steps 1500 --workers 2

Real: verl's `TrainingWorker` in its own worker group on Ray, its FSDP engine (as `capo_rl.verl.CAPOEngine`), its loss,
optimizer and dispatch, and its GRPO advantages. Stood in for, since verl's trainer wants GPUs and its rollout vLLM or
SGLang: the trainer's loop, by the lines below, and the rollout, by `generate` of transformers with the workers'
weights. The model is the tests' tiny one, rewarded for even words; CAPO is the paper's mask. Needs what docs/verl.md
installs; writes results/verl/cpu.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ |= {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "verl_cpu,capo_rl.verl"}
warnings.simplefilter("ignore")

import torch  # noqa: E402
import verl  # noqa: E402, F401 (which loads capo_rl.verl by its own setting)
from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage  # noqa: E402
from verl.workers.config import (  # noqa: E402
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.utils.losses import ppo_loss  # noqa: E402

from capo_rl.verl import CAPOActorConfig  # noqa: E402
from conftest import make_model, make_tokenizer, prompts, wants_even_words  # noqa: E402
from verl_cpu import packed, update, workers_on_ray  # noqa: E402

COMPLETIONS, GROUP, LENGTH, TEMPERATURE = 16, 4, 6, 0.9
EOS, PAD = 1, 0


def main(steps: int, workers: int, lr: float, out: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, tokenizer = make_model(), make_tokenizer()
    asked = tokenizer([row["prompt"] for row in prompts()], return_tensors="pt")["input_ids"]
    log = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        share = COMPLETIONS // workers
        paper = {"mode": "mask", "share": False}
        actor = CAPOActorConfig(capo=paper, strategy="fsdp2", rollout_n=GROUP, ppo_micro_batch_size_per_gpu=share)
        engine = FSDPEngineConfig(
            strategy="fsdp2",
            mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32"},
            use_torch_compile=False,
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=share,
        )
        config = TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=folder,
                enable_gradient_checkpointing=False,
                override_config={"attn_implementation": "sdpa"},
            ),
            engine_config=engine,
            optimizer_config=FSDPOptimizerConfig(lr=lr, weight_decay=0.0, total_training_steps=steps),
            checkpoint_config=CheckpointConfig(),
        )
        with workers_on_ray(workers, config, partial(ppo_loss, config=actor)) as group:
            for step in range(1, steps + 1):
                start = time.perf_counter()
                batch, reward = rollout(model, tokenizer, asked[torch.randint(len(asked), (COMPLETIONS // GROUP,))])
                metrics = update(group, packed(batch, temperature=TEMPERATURE, micro_batch=share))
                engines, states, weights = zip(*group.state(), strict=True)
                model.load_state_dict(weights[0])
                figures = {name: whole(name, values) for name, values in metrics.items() if measured(name)}
                log.append({"step": step, "reward": reward} | figures | {"seconds": time.perf_counter() - start})
                print(json.dumps(log[-1]), flush=True)
    assert set(engines) == {"CAPOEngine"}
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in states[0])
    setting = {"steps": steps, "workers": workers, "lr": lr, "completions": COMPLETIONS, "capo": asdict(actor.capo)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(written(setting, log))


def written(setting: dict[str, object], log: list[dict[str, float]]) -> str:
    """The log as JSON, a line for each figure; what never changed stands apart."""
    packages = {name: version(name) for name in ("verl", "ray", "torch", "transformers", "tensordict")}
    names = list(dict.fromkeys(name for row in log for name in row))
    columns = {name: [significant(row.get(name)) for row in log] for name in names}
    always = {name: column[0] for name, column in columns.items() if all(each == column[0] for each in column)}
    by_step = ",\n".join(f"  {json.dumps(name)}: {json.dumps(columns[name])}" for name in names if name not in always)
    head = json.dumps({"versions": packages, "setting": setting, "at_every_step": always})[:-1]
    return f'{head}, "by_step": {{\n{by_step}\n}}}}\n'


@torch.no_grad()
def rollout(model, tokenizer, asked):
    """A mini-batch of completions, `GROUP` for each prompt, with GRPO's advantages; and their mean reward."""
    asked = asked.repeat_interleave(GROUP, dim=0)
    answers = model.generate(
        asked,
        attention_mask=torch.ones_like(asked),
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        max_new_tokens=LENGTH,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )[:, asked.shape[1] :]
    answers = torch.nn.functional.pad(answers, (0, LENGTH - answers.shape[1]), value=PAD)
    ended = answers == EOS
    mask = (ended.cumsum(1) - ended.long() == 0).long()  # up to the first end, and with it
    answers = answers * mask
    rewards = torch.tensor(wants_even_words(tokenizer.batch_decode(answers, skip_special_tokens=True)))
    at_end = torch.zeros(answers.shape)
    at_end[torch.arange(len(answers)), mask.sum(1) - 1] = rewards
    groups = torch.arange(len(answers)).div(GROUP, rounding_mode="floor").numpy()
    advantages, _ = compute_grpo_outcome_advantage(at_end, mask, groups)
    logits = model(torch.cat([asked, answers], dim=1)).logits[:, asked.shape[1] - 1 : -1] / TEMPERATURE
    log_pi = logits.log_softmax(-1).gather(-1, answers[..., None]).squeeze(-1)
    batch = {"prompts": asked, "responses": answers, "response_mask": mask, "advantages": advantages}
    return batch | {"old_log_probs": log_pi * mask}, float(rewards.mean())


def measured(name: str) -> bool:
    """What is kept: no quantiles, and nothing of an accelerator's memory, which the stand-in platform makes up."""
    return name.startswith(("capo/", "actor/", "grad_norm", "loss", "lr")) and not name.endswith(("q50", "q90", "q99"))


def whole(name: str, values: list[float] | float) -> float:
    """One figure of the workers': CAPO's are already of all of them, and have to agree."""
    values = values if isinstance(values, list) else [values]
    if name.startswith("capo/") and name != "capo/seconds":
        assert all(each == values[0] or each != each for each in values), name
        return values[0]
    return sum(values) / len(values)


def significant(value: float | None) -> float | None:
    """Three digits, or a count; nothing where there is no number."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.3g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "verl" / "cpu.json")
    main(**vars(parser.parse_args()))
