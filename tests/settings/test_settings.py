"""A setting works or is refused by name, with the way out, before anything is trained."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, MixtralConfig

from capo_rl import CAPOConfig
from capo_rl.runs.records import RunFolderError
from capo_rl.settings.fields import NEEDS, NOT_HERE, RANGES, check_fields
from capo_rl.settings.recipe import RecipeError, read_recipe
from capo_rl.trainers.checkpoints import CheckpointError, WholeCheckpoints, checkpoints
from capo_rl.trainers.train import make_trainer, train
from conftest import ROOT, WORDS

QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
RESULT = ROOT / "results" / "settings" / "fields.json"


def with_lines(tmp_path: Path, lines: str) -> str:
    replaced = {line.split(":")[0] for line in lines.splitlines()}
    kept = [line for line in Path(QUICKSTART).read_text().splitlines() if line.split(":")[0] not in replaced]
    (tmp_path / "r.yaml").write_text("\n".join([*kept, lines]))
    return str(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("load_in_4bit: true", "load_in_4bit=True would be ignored: `capo train` trains the weights in `dtype`"),
        ("load_in_8bit: true", "load_in_8bit=True would be ignored"),
        ("bnb_4bit_quant_type: fp4", "bnb_4bit_quant_type='fp4' would be ignored"),
        ("lora_r: 4", "lora_r=4 says nothing without use_peft: true: set that, or leave it out"),
        ("lora_task_type: SEQ_CLS", "lora_task_type='SEQ_CLS' would be ignored"),
        ("save_strategy: best", "save_strategy='best' knows no best one: .* no evaluation set.*give `steps`"),
        ("save_strategy: no", "save_strategy=False must be text; YAML reads a bare .* put it in quotes"),
        ("save_total_limit: -1", "save_total_limit=-1 must be at least 1, or null to keep every checkpoint"),
        ("save_total_limit: 0", "save_total_limit=0 must be at least 1"),
        ("eval_strategy: steps", "eval_strategy='steps' would be ignored: .* measure checkpoints with `capo eval`"),
        ("eval_strategy: epoch", "eval_strategy='epoch' would be ignored"),
        ("load_best_model_at_end: true\nsave_strategy: 'no'", "load_best_model_at_end=True would be ignored"),
        ("push_to_hub: true", "push_to_hub=True would be ignored: `capo train` uploads nothing"),
        ("remove_unused_columns: true", "remove_unused_columns=True would be ignored: the answers"),
        ("data_seed: 3", "data_seed=3 would be ignored: TRL draws prompts with `seed`"),
        ("label_smoothing_factor: 0.1", "label_smoothing_factor=0.1 would be ignored"),
        ("model_init_kwargs: {dtype: bfloat16}", "model_init_kwargs=.* would be ignored: .*dtype, attn_implementation"),
        ("vllm_server_port: 1", "vllm_server_port=1 says nothing without use_vllm: true"),
        ("entropy_target: 1.0", "entropy_target=1.0 says nothing without use_adaptive_entropy: true"),
        ("optim_args: momentum=0.9", "optim_args='momentum=0.9' says nothing without an optim that takes them"),
        ("max_steps: 2.5", "max_steps=2.5 must be a whole number"),
        ("max_steps: 0", "max_steps=0 must be at least 1, or -1 for num_train_epochs"),
        ("max_steps: true", "max_steps=True must be a whole number"),
        ("learning_rate: [1, 2]", r"learning_rate=\[1, 2\] must be a number"),
        ("learning_rate: -1", "learning_rate=-1.* must be a finite number, 0 or more"),
        ("learning_rate: .nan", "learning_rate=nan must be a finite number"),
        ("learning_rate: .inf", "learning_rate=inf must be a finite number"),
        ("learning_rate: null", "learning_rate=None must be a number"),
        ("temperature: 0", "temperature=0.* must be a finite number above 0"),
        ("adam_beta2: 1.0", r"adam_beta2=1.0 must be in \[0, 1\)"),
        ("top_p: 1.5", r"top_p=1.5 must be in \(0, 1\]"),
        ("gradient_accumulation_steps: 0", "gradient_accumulation_steps=0 must be at least 1"),
        ("dataset_limit: -3", "dataset_limit=-3 must be at least 1"),
        ("dataset_config: 8", "dataset_config=8 must be text: put it in quotes"),
        ("use_cpu: 3", "use_cpu=3 must be true or false"),
        ("reward_weights: '1'", "reward_weights='1' must be a list"),
        ("capo_top_k: 5.5", "capo_top_k=5.5 must be a whole number, or null"),
        ("capo_hessian_low: .nan", "capo_hessian_low is NaN: give a number, or null"),
        ("capo_hessian_low: 1.0\ncapo_hessian_high: -1.0", "capo_hessian_low=1.0 and capo_hessian_high=-1.0: .*swap"),
        ("capo_fisher_threshold: 0.0", "capo_fisher_threshold=0.0 must be above 0, .* rejects every token"),
        ("capo_soft: true", "capo_soft and capo_penalty take the mask's place, and capo_mode='trust_region' has none"),
        ("seed: 1\nseed: 2", "`seed` stands twice, in lines"),
    ],
)
def test_is_refused_by_name(tmp_path, lines, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(with_lines(tmp_path, lines), [])


@pytest.mark.parametrize(
    "lines",
    [
        "learning_rate: 1e-4",  # text to YAML, a number to the parser
        "learning_rate: 1",
        "scale_rewards: false",
        "capo_mode: off",
        "capo_fisher_threshold: .inf",
        "use_peft: true\nlora_target_modules: all-linear",
        "lr_scheduler_kwargs: {num_cycles: 2}",
        "model_revision: main",
        "save_total_limit: null",
        "dtype: auto",
    ],
)
def test_what_is_right_passes(tmp_path, lines):
    read_recipe(with_lines(tmp_path, lines), [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capo_fisher_threshold": "1e-4"}, "capo_fisher_threshold='1e-4' must be a number, and this is text"),
        ({"capo_top_k": 5.5}, "capo_top_k=5.5 must be a whole number"),
        ({"capo_hessian_high": math.nan}, "capo_hessian_high is NaN"),
        ({"capo_hessian_low": 1.0, "capo_hessian_high": 0.5}, "capo_hessian_low=1.0 and capo_hessian_high=0.5"),
        ({"capo_fisher_threshold": 0}, "capo_fisher_threshold=0 must be above 0"),
        ({"capo_kl_every": 1.5}, "capo_kl_every=1.5 must be a whole number"),
        ({"capo_share": "yes"}, "capo_share='yes' must be true or false"),
        ({"capo_mode": "shorten", "capo_penalty": 1.0}, "capo_mode='shorten' has none"),
    ],
    ids=str,
)
def test_capos_own_are_refused_in_python_too(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        CAPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_every_field_that_is_named_is_a_field():
    from dataclasses import fields

    from trl import ModelConfig

    from capo_rl.settings.recipe import DataConfig

    known = {each.name for section in (DataConfig, ModelConfig, CAPOConfig) for each in fields(section)}
    # of this version of TRL: an older one may lack some
    assert len((NOT_HERE.keys() | NEEDS.keys() | RANGES.keys()) - known) < 12


def test_nothing_is_ignored():
    """What scripts/every_field.py found when it last set each field of TRL's alone."""
    rows = json.loads(RESULT.read_text())
    assert {name for name, row in rows.items() if row["status"] not in ("works", "refused")} == set()
    assert {name for name, row in rows.items() if row.get("alone", "refused") != "refused"} == set()


@pytest.mark.parametrize("limit", [-1, 0, None])
def test_no_limit_keeps_every_checkpoint(build, tmp_path, limit):
    build(WholeCheckpoints, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=limit).train()
    assert list(checkpoints(tmp_path / "run")) == [3, 2, 1]


# ---- folders -----------------------------------------------------------------------------------------------------

SHORT = ["--max_steps", "2", "--dataset_limit", "32", "--save_steps", "1", "--disable_tqdm", "true"]


def short(folder: Path, *more: str):
    return read_recipe(QUICKSTART, [*SHORT, "--output_dir", str(folder), *more])


def test_an_output_dir_that_is_a_file_or_below_one(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunFolderError, match=r"output_dir=.*: .*file is a file; give a folder"):
            train(short(folder))


def test_an_output_dir_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, how: Path(place) != tmp_path)
    with pytest.raises(RunFolderError, match=r"output_dir=.*can't be written; give another folder"):
        train(short(tmp_path / "run"))


def test_resuming_from_a_named_checkpoint_in_a_new_folder(tmp_path):
    train(short(tmp_path / "one"))
    first = tmp_path / "one" / "checkpoint-1"
    train(short(tmp_path / "two", "--resume_from_checkpoint", str(first)))
    steps = [json.loads(line)["step"] for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert steps[0] == 2
    weights = [(tmp_path / run / "checkpoint-2" / "model.safetensors").read_bytes() for run in ("one", "two")]
    assert weights[0] == weights[1]
    with pytest.raises(CheckpointError, match=r"resume_from_checkpoint=.*nowhere: no such folder; give a checkpoint-N"):
        train(short(tmp_path / "three", "--resume_from_checkpoint", str(tmp_path / "nowhere")))
    (first / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"resume_from_checkpoint=.*model.safetensors has 0 of the"):
        train(short(tmp_path / "four", "--resume_from_checkpoint", str(first)))


def test_a_run_goes_on_whether_its_step_model_is_named_or_not(tmp_path):
    """The recipe names `adam`, which `auto` comes to."""
    train(short(tmp_path / "run", "--capo_step", "auto"))
    assert train(short(tmp_path / "run", "--max_steps", "3"))["steps"] == 3


def test_going_on_without_an_optimizer_is_told_before_and_refused_with_the_way_out(tmp_path, caplog, monkeypatch):
    def stop(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("capo_rl.trainers.train.Record.on_step_begin", stop, raising=False)
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit):
        train(short(tmp_path / "run", "--save_only_model", "true"))
    said = [each.getMessage() for each in caplog.records if each.name == "capo_rl.trainers.train"]
    assert "save_only_model: true writes checkpoints that no run can go on from" in said[0]
    assert "step 1 is in its checkpoint, and its weights are what is left" in said[-1]
    with pytest.raises(CheckpointError, match=r"save_only_model: true .*give it as model_name_or_path"):
        train(short(tmp_path / "run", "--save_only_model", "true"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optim", "paged_adamw_8bit"], "bitsandbytes"),
        (["--use_peft", "true", "--lora_target_modules", "nothing"], "Target modules nothing not found"),
        (["--report_to", "comet_ml"], "comet"),
        (["--use_liger_kernel", "true"], "use_liger_kernel needs liger-kernel"),
        (["--capo_mode", "mask", "--capo_step", "auto", "--optim", "adafactor"], "capo_step='auto' knows"),
        (["--fp16", "true"], "fp16=True would be ignored: Accelerate has it for accelerators only"),
        (["--model_revision", "v2"], "only a hub id has revisions"),
    ],
)
def test_what_libraries_refuse_is_an_error_of_the_recipe(tmp_path, options, message):
    with pytest.raises(RecipeError, match=message):
        make_trainer(short(tmp_path / "run", *options))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plot", "run", "--out", "nowhere/a.png"], "--out: nowhere/a.png: there is no folder nowhere; make it"),
        (["plot", "run", "--out", "a.xyz"], "--out: a.xyz: a picture's name ends in one of .png"),
        (["calibrate", QUICKSTART, "--out", "nowhere/a.yaml"], "there is no folder nowhere"),
        (["report", "run", "--out", "nowhere/a.html"], "there is no folder nowhere"),
        (["explain", "run", "--out", "."], "--out: .: can't be written"),
    ],
)
def test_a_file_that_cannot_be_written_is_known_at_once(tmp_path, arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "capo_rl.cli", *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# ---- terms of the loss that the moments do not see -------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"entropy_coef": 0.1}, {"use_adaptive_entropy": True}], ids=str)
@pytest.mark.parametrize(("mode", "times"), [("mask", 1), ("shorten", 1), ("monitor", 1), ("trust_region", 0)])
def test_the_entropy_bonus_is_named(build, caplog, settings, mode, times):
    with caplog.at_level(logging.WARNING):
        build(capo_mode=mode, **settings)
    assert [next(iter(settings)) in each.getMessage() for each in caplog.records if "entropy" in each.getMessage()] == [
        True
    ] * times


def test_a_routers_loss_does_not_reach_the_last_layer():
    config = MixtralConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, output_router_logits=True,
    )  # fmt: skip
    import torch

    model = AutoModelForCausalLM.from_config(config)
    loss = model(torch.arange(8)[None], output_router_logits=True).aux_loss
    loss.backward()
    assert model.lm_head.weight.grad is None or not model.lm_head.weight.grad.any()
    assert any(weight.grad is not None and weight.grad.any() for weight in model.parameters())


def test_what_transformers_fills_in_is_not_taken_for_a_wish():
    args = CAPOConfig(output_dir="run", use_cpu=True, bf16=False)
    args.fsdp_config = {"min_num_params": 0, "xla": False}  # as transformers 5.9 leaves it
    check_fields([args])
    args.fsdp_config = {"min_num_params": 1, "xla": False}
    with pytest.raises(ValueError, match=r"fsdp_config=.* says nothing without fsdp"):
        check_fields([args])
