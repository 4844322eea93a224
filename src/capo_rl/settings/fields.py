"""Every field of a recipe works or is refused by name: nothing that was asked for is ignored, and nothing out of range
is found by a traceback after the model has loaded (docs/fields.md has the table).
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from capo_rl.curvature.step_model import fit_of_name

_EVALUATION = "`capo train` has no evaluation set; measure checkpoints with `capo eval`"
_HUB = "`capo train` uploads nothing; `hf upload` sends a checkpoint when the run is over"
_QUANTISED = (
    "`capo train` trains the weights in `dtype` and quantises nothing; use_peft with dtype: bfloat16 needs less "
    "memory, and in a script CAPOTrainer takes a model that was loaded quantised"
)

# Fields that would be ignored here, whatever else is set, and what to do instead.
NOT_HERE: dict[str, str] = {
    **dict.fromkeys(
        [
            "eval_strategy",
            "eval_steps",
            "eval_delay",
            "eval_on_start",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "eval_accumulation_steps",
            "per_device_eval_batch_size",
            "num_generations_eval",
            "prediction_loss_only",
            "include_for_metrics",
            "batch_eval_metrics",
            "bf16_full_eval",
            "fp16_full_eval",
            "load_best_model_at_end",
            "metric_for_best_model",
            "greater_is_better",
            "label_names",
            "do_eval",
            "do_predict",
        ],
        _EVALUATION,
    ),
    **dict.fromkeys(
        [
            "push_to_hub",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
            "log_completions_hub_repo",
        ],
        _HUB,
    ),
    **dict.fromkeys(
        ["load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"],
        _QUANTISED,
    ),
    "model_init_kwargs": "the model is loaded by dtype, attn_implementation and model_revision; use those",
    "lora_task_type": "what is trained is a causal language model; leave it out",
    "label_smoothing_factor": "GRPO's loss has no labels to smooth; leave it out",
    "average_tokens_across_devices": "TRL counts the tokens of a step by itself, by loss_type; leave it out",
    "include_num_input_tokens_seen": "TRL counts tokens in `num_tokens`; leave it out",
    "train_sampling_strategy": "TRL samples prompts in groups; shuffle_dataset is what there is to choose",
    "length_column_name": "TRL samples prompts in groups, not by length; leave it out",
    "data_seed": "TRL draws prompts with `seed`; use that",
    "remove_unused_columns": "the answers that the reward needs would be removed; leave it out",
    "enable_jit_checkpoint": "on SIGTERM `capo train` writes a checkpoint by itself; leave it out",
    "max_tool_calling_iterations": "a recipe has no tools; use CAPOTrainer in a script",
    "log_multimodal": "a recipe's prompts are text; leave it out",
    "local_rank": "the launcher sets it; start several processes with `accelerate launch`",
    "do_train": "`capo train` trains, whatever this says; leave it out",
}


def _on(name: str) -> tuple[str, Callable[[Mapping[str, Any]], bool]]:
    return f"{name}: true", lambda given: bool(given[name])


def _is(name: str, *values: str) -> tuple[str, Callable[[Mapping[str, Any]], bool]]:
    return f"{name}: {' or '.join(values)}", lambda given: str(getattr(given[name], "value", given[name])) in values


def _reports(given: Mapping[str, Any]) -> bool:
    return given["report_to"] not in ([], ["none"], "none", None)


# Fields that say nothing unless another one is set: what to set, and whether it is.
NEEDS: dict[str, tuple[str, Callable[[Mapping[str, Any]], bool]]] = {
    **dict.fromkeys(
        [
            "lora_r",
            "lora_alpha",
            "lora_dropout",
            "lora_target_modules",
            "lora_target_parameters",
            "lora_modules_to_save",
            "use_rslora",
            "use_dora",
        ],
        _on("use_peft"),
    ),
    **dict.fromkeys(
        [
            "vllm_mode",
            "vllm_model_impl",
            "vllm_enable_sleep_mode",
            "vllm_structured_outputs_regex",
            "vllm_server_base_url",
            "vllm_server_host",
            "vllm_server_port",
            "vllm_server_timeout",
            "vllm_group_port",
            "vllm_gpu_memory_utilization",
            "vllm_max_model_length",
            "vllm_tensor_parallel_size",
            "vllm_importance_sampling_correction",
            "vllm_importance_sampling_mode",
            "vllm_importance_sampling_clip_max",
            "vllm_importance_sampling_clip_min",
            "vllm_importance_sampling_cap",
        ],
        _on("use_vllm"),
    ),
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), _is("loss_type", "sapo")),
    **dict.fromkeys(["vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"], _is("loss_type", "vespo")),
    **dict.fromkeys(
        ["entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"], _on("use_adaptive_entropy")
    ),
    **dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps"), _on("sync_ref_model")),
    **dict.fromkeys(("sync_ref_model", "use_bias_correction_kl"), ("beta above 0", lambda given: given["beta"] != 0)),
    **dict.fromkeys(("num_completions_to_print", "log_unique_prompts"), _on("log_completions")),
    **dict.fromkeys(("run_name", "project"), ("report_to", _reports)),
    **dict.fromkeys(
        ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        ("report_to: trackio", lambda given: "trackio" in (given["report_to"] or [])),
    ),
    "fsdp_config": ("fsdp (Accelerate has its own file: recipes/accelerate/)", lambda given: bool(given["fsdp"])),
    "liger_kernel_config": _on("use_liger_kernel"),
    "transformers_continuous_batching_config": _on("use_transformers_continuous_batching"),
    **dict.fromkeys(
        ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
        (
            "gradient_checkpointing: true (of which gradient_checkpointing_kwargs are the kwargs by their old name)",
            lambda given: bool(given["gradient_checkpointing"]),
        ),
    ),
    **dict.fromkeys(
        [
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
            "dataloader_in_order",
        ],
        ("dataloader_num_workers above 0", lambda given: given["dataloader_num_workers"] > 0),
    ),
    "optim_target_modules": (
        "an optim of galore, apollo or lomo",
        lambda given: (
            re.search("galore|apollo|lomo", str(getattr(given["optim"], "value", given["optim"]))) is not None
        ),
    ),
    "optim_args": (
        "an optim that takes them (Adam's are adam_beta1, adam_beta2 and adam_epsilon)",
        lambda given: (
            fit_of_name(given["optim"]).model != "adam" or "anyprecision" in str(getattr(given["optim"], "value", ""))
        ),
    ),
}

_AT_LEAST_1 = ("must be at least 1", lambda value: value >= 1)
_ABOVE_0 = ("must be a finite number above 0", lambda value: 0 < value < math.inf)
_NOT_NEGATIVE = ("must be a finite number, 0 or more", lambda value: 0 <= value < math.inf)
_BETA = ("must be in [0, 1)", lambda value: 0 <= value < 1)

# What a number may be; so written that NaN is out of every range.
RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        [
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_iterations",
            "max_completion_length",
            "generation_batch_size",
            "steps_per_generation",
            "dataset_limit",
            "max_prompt_length",
            "lora_r",
            "lora_alpha",
            "ref_model_sync_steps",
            "ddp_timeout",
        ],
        _AT_LEAST_1,
    ),
    **dict.fromkeys(
        [
            "temperature",
            "num_train_epochs",
            "adam_epsilon",
            "repetition_penalty",
            "save_steps",
            "logging_steps",
            "delta",
            "sapo_temperature_neg",
            "sapo_temperature_pos",
        ],
        _ABOVE_0,
    ),
    **dict.fromkeys(
        [
            "learning_rate",
            "weight_decay",
            "max_grad_norm",
            "beta",
            "warmup_steps",
            "top_k",
            "dataloader_num_workers",
            "epsilon",
            "epsilon_high",
            "neftune_noise_alpha",
            "seed",
        ],
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), _BETA),
    "top_p": ("must be in (0, 1]", lambda value: 0 < value <= 1),
    "min_p": ("must be in [0, 1]", lambda value: 0 <= value <= 1),
    "top_entropy_quantile": ("must be in (0, 1]", lambda value: 0 < value <= 1),
    "ref_model_mixup_alpha": ("must be in [0, 1]", lambda value: 0 <= value <= 1),
    "max_steps": ("must be at least 1, or -1 for num_train_epochs", lambda value: value >= 1 or value == -1),
    "save_total_limit": ("must be at least 1, or null to keep every checkpoint", lambda value: value >= 1),
    "save_strategy": (
        f'knows no best one: {_EVALUATION}; give `steps`, `epoch` or `"no"`',
        lambda value: str(getattr(value, "value", value)) != "best",
    ),
}


def wrong_type(value: Any, hint: Any) -> str | None:
    """What is wrong with a value of a field, None if it has the field's type.

    >>> wrong_type(2.5, int)
    'must be a whole number'
    >>> wrong_type(1, float), wrong_type("1e-4", float)
    (None, 'must be a number, and this is text: write it without quotes, and 1e-4 in YAML as 1.0e-4')
    >>> wrong_type(False, str)
    'must be text; YAML reads a bare on, off, yes or no as true or false: put it in quotes'
    """
    if _fits(value, hint):
        return None
    kinds = [each for each in (typing.get_args(hint) if _is_union(hint) else (hint,)) if each is not type(None)]
    kind = kinds[0]
    if kind in (int, float):
        what = "a whole number" if kind is int else "a number"
        if isinstance(value, str):
            return f"must be {what}, and this is text: write it without quotes, and 1e-4 in YAML as 1.0e-4"
        return f"must be {what}" + (", or null" if _fits(None, hint) and value is not None else "")
    if kind is bool:
        return "must be true or false"
    if typing.get_origin(kind) is list or kind is list:
        return "must be a list"
    if typing.get_origin(kind) is dict or kind is dict:
        return "must be a mapping"
    if isinstance(value, bool):
        return "must be text; YAML reads a bare on, off, yes or no as true or false: put it in quotes"
    return "must be text: put it in quotes" if value is not None else "can't be null: leave it out"


def check_types(given: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Raises `ValueError`, naming the field, for a value that a YAML file gives another type than the field has.

    Text passes for numbers, since the parser reads it as on the command line.
    """
    for name, value in given.items():
        hint = hints.get(name)
        # TRL's own conventions, and how YAML reads a bare `off`; a missing dataset has a message of its own
        if hint is None or (name in ("scale_rewards", "capo_mode") and isinstance(value, bool)):
            continue
        if isinstance(value, str) and not _only_collections(hint):
            continue
        if value is None and name == "dataset_name":
            continue
        if (wrong := wrong_type(value, hint)) is not None:
            raise ValueError(f"{name}={value!r} {wrong}")


def check_fields(sections: Iterable[Any]) -> None:
    """Raises `ValueError` for a field that would be ignored, or is out of range, naming the field and the fix."""
    given: dict[str, Any] = {}
    changed: dict[str, Any] = {}
    for section in sections:
        for each in fields(section):
            default = each.default if each.default is not MISSING else each.default_factory()  # type: ignore[operator]
            value = vars(section)[each.name]
            given[each.name] = value
            if value != default:
                changed[each.name] = value
    for name, value in changed.items():
        if name in NOT_HERE and not _set_by_trl(name, given):
            raise ValueError(f"{name}={_shown(value)} would be ignored: {NOT_HERE[name]}")
    for name, value in changed.items():
        if name in NEEDS and not NEEDS[name][1](given) and not _set_by_trl(name, given):
            raise ValueError(f"{name}={_shown(value)} says nothing without {NEEDS[name][0]}: set that, or leave it out")
        if name in RANGES and value is not None and not RANGES[name][1](value):
            raise ValueError(f"{name}={_shown(value)} {RANGES[name][0]}")


def _set_by_trl(name: str, given: Mapping[str, Any]) -> bool:
    """Whether `__post_init__` may have made the value, of another field's or of nothing."""
    scheduler = str(getattr(given["lr_scheduler_type"], "value", given["lr_scheduler_type"]))
    if name in ("metric_for_best_model", "greater_is_better"):
        return scheduler in ("reduce_lr_on_plateau", "greedy") and given["metric_for_best_model"] == "loss"
    if name == "vllm_importance_sampling_clip_max":
        return given.get("vllm_importance_sampling_cap") is not None
    if name == "fsdp_config":  # some versions of transformers fill in what says nothing
        return isinstance(given[name], dict) and not any(given[name].values())
    return name == "include_num_input_tokens_seen" and given[name] == "no"


def _shown(value: Any) -> str:
    return repr(getattr(value, "value", value))


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _only_collections(hint: Any) -> bool:
    """Whether text can't be right: it is for lists of anything but text."""
    kinds = [each for each in (typing.get_args(hint) if _is_union(hint) else (hint,)) if each is not type(None)]
    return all(typing.get_origin(each) is list and typing.get_args(each) != (str,) for each in kinds)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if _is_union(hint):
        return any(_fits(value, each) for each in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(each, arguments[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint)
