"""Every field of `ModelConfig` and `GRPOConfig`, set alone to a value that is not its default, through the path of
`capo train`: read the recipe, make the trainer, train two steps of the embedded model, write a checkpoint.

    python scripts/every_field.py [FIELD ...]

Writes results/settings/fields.json and docs/fields.md. What a field is, by this rule:

    refused        an error that names the field (or, for a library that is missing, the library), and no traceback
    works          the recipe is accepted, and code beside the parser reads the field, or parsing it sets what such code
                   reads; `changed` says whether weights or files came out otherwise than without it
    ignored        accepted, and read by nothing
    crashed        anything else

Fields that need another one are set with it, and once more alone: then they must be refused. Each field runs in a
process of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml
from trl import GRPOConfig, ModelConfig

from capo_rl.settings.config import CAPOConfig
from capo_rl.settings.fields import NEEDS, NOT_HERE
from capo_rl.settings.recipe import read_recipe
from capo_rl.trainers.train import train

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "results" / "settings" / "fields.json", ROOT / "docs" / "fields.md"
SECONDS = 120  # a field's process may take

BASE: dict[str, Any] = {
    "model_name_or_path": "embedded",
    "dataset_name": "arithmetic",
    "dataset_limit": 32,
    "max_prompt_length": 64,
    "seed": 0,
    "capo_mode": "trust_region",
    "capo_watch": True,
    "capo_max_missing_mass": 1.0,
    "num_generations": 4,
    "loss_type": "grpo",
    "max_completion_length": 48,
    "per_device_train_batch_size": 8,
    "max_steps": 2,
    "learning_rate": 1.0e-3,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}
LORA, VLLM, REF = {"use_peft": True}, {"use_vllm": True}, {"beta": 0.05}
ADAPTIVE, LOGGED = {"use_adaptive_entropy": True}, {"log_completions": True}
OFF_POLICY = {"num_iterations": 2}
# Values, where flipping a flag or adding one to a number would not do, and what has to be set beside.
VALUES: dict[str, Any] = {
    "model_name_or_path": str(ROOT / "src" / "capo_rl" / "embedded"),
    "model_revision": "other",
    "dtype": "bfloat16",
    "attn_implementation": "eager",
    "lora_dropout": 0.5,
    "lora_target_modules": ["q_proj", "up_proj"],
    "lora_target_parameters": ["mlp.up_proj.weight"],
    "lora_modules_to_save": ["norm"],
    "lora_task_type": "SEQ_CLS",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_quant_storage": "uint8",
    "num_train_epochs": 0.5,
    "per_device_train_batch_size": 16,
    "num_iterations": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "learning_rate": 1.0e-2,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "warmup_steps": 1,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "weight_decay": 0.1,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 1.0e-3,
    "optim_target_modules": ["q_proj"],
    "max_grad_norm": 1.0e-3,
    "label_smoothing_factor": 0.1,
    "bf16": True,
    "activation_checkpointing": True,
    "gradient_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "liger_kernel_config": {"rope": False},
    "neftune_noise_alpha": 5.0,
    "torch_empty_cache_steps": 1,
    "logging_strategy": "epoch",
    "logging_steps": 2,
    "include_num_input_tokens_seen": "all",
    "log_level": "debug",
    "log_level_replica": "debug",
    "report_to": "tensorboard",
    "run_name": "a",
    "project": "a",
    "trackio_space_id": "a/b",
    "trackio_bucket_id": "a",
    "trackio_static_space_id": "a",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "include_for_metrics": ["loss"],
    "save_strategy": "epoch",
    "save_steps": 2,
    "eval_accumulation_steps": 2,
    "save_total_limit": 1,
    "hub_token": "a",
    "hub_private_repo": True,
    "hub_model_id": "a/b",
    "hub_strategy": "end",
    "hub_revision": "a",
    "metric_for_best_model": "reward",
    "greater_is_better": True,
    "data_seed": 1,
    "accelerator_config": {"use_seedable_sampler": False},
    "parallelism_config": {"dp_shard_size": 1},
    "seed": 1,
    "dataloader_num_workers": 1,
    "dataloader_prefetch_factor": 4,
    "dataloader_multiprocessing_context": "fork",
    "remove_unused_columns": True,
    "label_names": ["a"],
    "train_sampling_strategy": "sequential",
    "length_column_name": "a",
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 5,
    "ddp_broadcast_buffers": False,
    "ddp_static_graph": True,
    "ddp_backend": "gloo",
    "fsdp": "full_shard",
    "fsdp_config": {"version": 2},
    "deepspeed": "nowhere.json",
    "debug": "underflow_overflow",
    "resume_from_checkpoint": "nowhere",
    "local_rank": 0,
    "output_dir": None,
    "model_init_kwargs": {"dtype": "float32"},
    "router_aux_loss_coef": 0.1,
    "num_generations": 2,
    "num_generations_eval": 2,
    "max_completion_length": 40,
    "pad_to_multiple_of": 4,
    "generation_batch_size": 16,
    "steps_per_generation": 2,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.5,
    "generation_kwargs": {"do_sample": False},
    "chat_template_kwargs": {"a": 1},
    "repetition_penalty": 2.0,
    "cache_implementation": "static",
    "vllm_mode": "server",
    "vllm_model_impl": "transformers",
    "vllm_structured_outputs_regex": "a",
    "vllm_server_base_url": "http://a",
    "vllm_server_host": "a",
    "vllm_gpu_memory_utilization": 0.5,
    "vllm_max_model_length": 64,
    "beta": 0.05,
    "epsilon": 0.001,
    "delta": 1.001,
    "epsilon_high": 0.001,
    "importance_sampling_level": "sequence",
    "reward_weights": [2.0],
    "multi_objective_aggregation": "normalize_then_sum",
    "scale_rewards": "none",
    "loss_type": "dr_grpo",
    "ref_model_mixup_alpha": 0.1,
    "ref_model_sync_steps": 1,
    "top_entropy_quantile": 0.5,
    "entropy_coef": 0.1,
    "entropy_coef_min": 0.1,
    "entropy_coef_max": 0.001,
    "entropy_coef_delta": 0.1,
    "entropy_target": 50.0,
    "max_tool_calling_iterations": 2,
    "vllm_importance_sampling_mode": "token_mask",
    "vllm_importance_sampling_clip_min": 0.5,
    "vllm_importance_sampling_cap": 2.0,
    "off_policy_mask_threshold": 1.0e-9,
    "num_completions_to_print": 1,
    "log_completions_hub_repo": "a/b",
    "transformers_continuous_batching_config": {"block_size": 16},
}
BESIDE: dict[str, dict[str, Any]] = {
    **{name: LORA for name in NEEDS if NEEDS[name][0] == "use_peft: true"},
    **{name: VLLM for name in NEEDS if NEEDS[name][0] == "use_vllm: true"},
    **{name: ADAPTIVE | {"entropy_coef": 0.01} for name in NEEDS if NEEDS[name][0] == "use_adaptive_entropy: true"},
    **{name: LOGGED for name in NEEDS if NEEDS[name][0] == "log_completions: true"},
    **{name: {"loss_type": "sapo"} for name in ("sapo_temperature_neg", "sapo_temperature_pos")},
    **{name: {"loss_type": "vespo"} for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")},
    **{
        name: REF | {"sync_ref_model": True, "ref_model_sync_steps": 1}
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps")
    },
    **dict.fromkeys(("sync_ref_model", "use_bias_correction_kl"), REF | OFF_POLICY),
    **dict.fromkeys(("epsilon", "epsilon_high", "delta", "off_policy_mask_threshold"), OFF_POLICY),
    **{name: {"report_to": "tensorboard"} for name in ("run_name", "project")},
    **{name: {"report_to": "trackio"} for name in NEEDS if name.startswith("trackio")},
    **{name: {"gradient_checkpointing": True} for name in NEEDS if name.endswith("checkpointing_kwargs")},
    **{name: {"dataloader_num_workers": 1} for name in NEEDS if name.startswith("dataloader")},
    "lora_target_parameters": LORA | {"lora_dropout": 0.0},
    "fsdp_config": {"fsdp": "full_shard"},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine"},
    "optim_args": {"optim": "sgd"},
    "optim_target_modules": {"optim": "galore_adamw"},
    "liger_kernel_config": {"use_liger_kernel": True},
    "transformers_continuous_batching_config": {"use_transformers_continuous_batching": True},
    "num_train_epochs": {"max_steps": -1},
    **{
        name: ADAPTIVE | {"entropy_coef": 0.01, "entropy_target": 50.0}
        for name in ("entropy_coef_max", "entropy_coef_delta")
    },
    "torch_compile_mode": {"torch_compile_backend": "eager"},
    "generation_batch_size": {"gradient_accumulation_steps": 1},
    # read when a run goes on
    "ignore_data_skip": {"stop_after": 1},
    "restore_callback_states_from_checkpoint": {"stop_after": 1},
    "resume_from_checkpoint": {},
    "save_total_limit": {"max_steps": 3},
}
# Fields that act where one process on a CPU has nothing to do, and where that is in the source.
ELSEWHERE = {"ddp_timeout": "capo_rl/trainers/train.py:train, with several processes"}
# What the parser itself does with the arguments, which is no use of them.
_SHOWING = {
    "to_dict",
    "to_sanitized_dict",
    "to_json_string",
    "__str__",
    "__repr__",
    "__eq__",
    "<dictcomp>",
    "check_fields",
}
# Methods of the arguments through which others read fields.
_PROPERTIES = {
    name for name in dir(GRPOConfig) if not name.startswith("__") and name not in _SHOWING | {"_validate_args"}
}
_PARSERS = {"<string>", "training_args.py", "grpo_config.py", "base_config.py", "model_config.py", "config.py"}


def other_value(item: Any) -> Any:
    """A value of a field that is not its default."""
    if item.name in VALUES:
        return VALUES[item.name]
    default = item.default if item.default is not MISSING else item.default_factory()
    if isinstance(default, bool) or default is None:
        return not default
    if isinstance(default, int | float):
        return default + 1
    raise SystemExit(f"{item.name}: give a value in VALUES")


def watch_reads(classes: Iterable[type]) -> dict[str, set[str]]:
    """From now on: where each field is read, by name."""
    reads: dict[str, set[str]] = {}
    for cls in classes:
        names = {item.name for item in fields(cls)}

        def reading(self: Any, name: str, names: set[str] = names) -> Any:
            if name in names:
                frame = sys._getframe(1)
                while frame.f_code.co_name in {"reading", "__get__"} or (
                    frame.f_code.co_filename.endswith("training_args.py") and frame.f_code.co_name in _PROPERTIES
                ):
                    assert frame.f_back is not None
                    frame = frame.f_back
                where = frame.f_code.co_name
                if where not in _SHOWING:
                    file = Path(frame.f_code.co_filename)
                    place = "parser" if file.name in _PARSERS else f"{file.parent.name}/{file.name}:{where}"
                    reads.setdefault(name, set()).add(place)
            return object.__getattribute__(self, name)

        cls.__getattribute__ = reading  # type: ignore[method-assign, assignment]
    return reads


def outcome(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a recipe, in this process."""
    said: list[str] = []

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    settings = dict(settings)
    stop_after = settings.pop("stop_after", None)
    reads = watch_reads((CAPOConfig, ModelConfig))
    file = folder / "recipe.yaml"
    run = folder / "run"
    given = {"output_dir": str(run)} | settings
    result: dict[str, Any] = {}
    try:
        if stop_after is not None:  # a run that was killed after a step, to be gone on with
            file.write_text(yaml.safe_dump(given))
            train(read_recipe(str(file)))
            for name in ("summary.json", "checkpoint-2"):
                os.system(f"rm -rf {run / name}")
            reads.clear()
        file.write_text(yaml.safe_dump(given))
        logging.getLogger().addHandler(Listen())
        recipe = read_recipe(str(file))
        asked = {name: repr(value) for each in (recipe.model, recipe.training) for name, value in vars(each).items()}
        train(recipe)
    except SystemExit as error:
        # of the parser, which names the option
        return {"error": f"the parser refuses it, with exit status {error.code}", "type": "SystemExit"}
    except Exception as error:
        return {"error": str(error), "type": type(error).__name__}
    folders = sorted(Path(recipe.training.output_dir).glob("checkpoint-*"), key=lambda each: each.stat().st_mtime)
    weights = [path for each in folders[-1:] for path in sorted(each.glob("*.safetensors")) if "capo" not in path.name]
    result["weights"] = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
    result["files"] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    result["reads"] = {name: sorted(places) for name, places in reads.items()}
    return result | {"asked": asked, "said": said}


def apart(settings: dict[str, Any]) -> dict[str, Any]:
    """The same in a process of its own, which may do what it likes to this library or that."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        child = os.fork()
        if not child:
            os.chdir(scratch)
            with open(Path(scratch) / "out", "w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            os.setsid()
            try:
                answer.write_text(json.dumps(outcome(settings, Path(scratch))))
            finally:
                os._exit(0)
        start = time.monotonic()
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() - start > SECONDS:
                os.killpg(child, 9)
                os.waitpid(child, 0)
                return {"error": f"not over after {SECONDS} s", "type": "TimeoutError"}
            time.sleep(0.05)
        if not answer.exists():
            return {"error": (Path(scratch) / "out").read_text()[-500:], "type": "died"}
        return json.loads(answer.read_text())


def judge(name: str, beside: Iterable[str], with_it: dict[str, Any], without: dict[str, Any]) -> dict[str, Any]:
    """What became of a field."""
    if "error" in with_it:
        message = " ".join(with_it["error"].split())
        libraries = ("install", "not available", "vLLM", "requires", "kernels")
        clear = with_it["type"] in ("RecipeError", "CheckpointError", "RunFolderError", "ModelError", "ReportError")
        named = any(each in message for each in (name, *beside)) or any(word in message for word in libraries)
        status = "refused" if (clear and named) or with_it["type"] == "SystemExit" else "crashed"
        message = re.sub(r"\S*/recipe\.yaml: |\S*/tmp\S*/", "", message)  # where this run happened to be
        return {"status": status, "message": message[-300:], "type": with_it["type"]}
    used = [place for place in with_it["reads"].get(name, []) if place != "parser"]
    sets = sorted(
        other
        for other, before in without["asked"].items()
        if other != name
        and with_it["asked"].get(other) != before
        and not other.startswith(("_", "output_dir", "logging_dir"))
    )
    sets = [other for other in sets if " object at 0x" not in without["asked"][other]]
    changed = [kind for kind in ("weights", "files") if with_it[kind] != without[kind]]
    used = used or [ELSEWHERE[name]] if name in ELSEWHERE else used
    status = "works" if used or sets else "ignored"
    return {"status": status, "read by": used[:3], "sets": sets[:4], "changed": changed}


def main(names: list[str]) -> None:
    rows: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for cls in (ModelConfig, GRPOConfig):
        for item in fields(cls):
            if names and item.name not in names:
                continue
            value, beside = other_value(item), BESIDE.get(item.name, {})
            key = json.dumps(beside, sort_keys=True)
            if key not in plain:
                plain[key] = apart(BASE | beside)
            without = plain[key]
            with_it = apart(BASE | beside | {item.name: value})
            if "error" in without and item.name not in NOT_HERE:  # its switch alone fails here: a library is missing
                without = with_it if "error" not in with_it else without
            shown = str(value).replace(f"{ROOT}/", "") if isinstance(value, str) else value
            row = {"of": cls.__name__, "value": shown, "with": beside} | judge(item.name, beside, with_it, without)
            if item.name in NEEDS:
                alone = judge(item.name, (), apart(BASE | {item.name: value}), plain.setdefault("{}", apart(BASE)))
                row["alone"] = alone["status"]
            rows[item.name] = row
            print(
                f"{item.name:42} {row['status']:8} {row.get('message', row.get('changed'))} {row.get('alone', '')}",
                flush=True,
            )
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    if names and RESULT.exists():
        rows = json.loads(RESULT.read_text()) | rows
    order = [item.name for cls in (ModelConfig, GRPOConfig) for item in fields(cls)]
    rows = {name: rows[name] for name in order if name in rows}
    RESULT.write_text(json.dumps(rows, indent=1, default=str) + "\n")
    write_page(rows)


def write_page(rows: dict[str, Any]) -> None:
    """The table of docs/fields.md."""
    counts = {status: sum(row["status"] == status for row in rows.values()) for status in ("works", "refused")}
    others = len(rows) - sum(counts.values())
    lines = [
        "# Every field of TRL's in a recipe",
        "",
        "Written by `scripts/every_field.py`, which sets each field of `ModelConfig` and `GRPOConfig` alone to a value",
        "that is not its default and runs `capo train`'s own path for two steps of the embedded model, on a CPU,",
        "without vLLM, DeepSpeed, bitsandbytes and the like. *Works*: code beside the parser reads it, or parsing it",
        "sets what such code reads; what came out otherwise than without it stands beside. *Refused*: an error that",
        "names the field or the missing library, before anything is trained. *Alone*: a field that needs another is",
        "refused without it.",
        "",
        f"{len(rows)} fields: {counts['works']} work, {counts['refused']} are refused by name, {others} are ignored or "
        "crash.",
        "",
        "| field | value, and set beside it | | what was seen |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        value = ", ".join([f"`{row['value']}`"] + [f"`{k}: {v}`" for k, v in row["with"].items()])
        if row["status"] == "works":
            seen = f"read by {', '.join(f'`{place}`' for place in row['read by'][:1]) or 'the parser'}"
            seen += (
                f", sets {', '.join(f'`{other}`' for other in row['sets'][:2])}"
                if row["sets"] and not row["read by"]
                else ""
            )
            seen += f"; other {', '.join(row['changed'])}" if row["changed"] else "; nothing came out otherwise"
        else:
            seen = row["message"].split("recipe.yaml: ")[-1].split("can't be trained so: ")[-1].replace("|", "\\|")
        lines.append(
            f"| `{name}` | {value} | {row['status']} | {seen}"
            f"{'; alone refused' if row.get('alone') == 'refused' else ''} |"
        )
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
