"""`capo train`: from a recipe to a trained model and the records of its run."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch.distributed
from datasets import Dataset, disable_progress_bars
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar
from trl import get_peft_config

from capo_rl.rewards.accuracy import accuracy_reward
from capo_rl.rewards.constraints import constraint_reward
from capo_rl.rewards.grading import shared_grader
from capo_rl.runs.data import DataError, as_prompts, drop_long_prompts, drop_ungradable, load_problems
from capo_rl.runs.models import load_model, load_tokenizer, locate
from capo_rl.runs.plots import draw_run
from capo_rl.runs.progress import Progress
from capo_rl.runs.records import (
    RunFolderError,
    check_folder,
    logged_steps,
    rewind_metrics,
    sole_writer,
    start_run,
    summarize,
    versions,
    write_json,
    write_metrics,
)
from capo_rl.settings.config import CAPOConfig
from capo_rl.settings.recipe import Recipe, RecipeError, settings
from capo_rl.trainers.checkpoints import (
    ASIDE,
    FiniteWeights,
    StopWhenTold,
    WholeCheckpoints,
    asked_point,
    check_resumable,
    resume_point,
)
from capo_rl.trainers.trl import CAPOTrainer

logger = logging.getLogger(__name__)


def train(recipe: Recipe) -> dict[str, Any]:
    """Run a recipe, or go on with it from its last checkpoint, and return its summary.

    A run that is over already is not run again, unless the recipe asks for more steps. Everything that can be wrong
    with the recipe, its folder, its last checkpoint and its data is found before the model loads. After SIGTERM or
    Ctrl-C the run writes a checkpoint and leaves with `SystemExit` of status 143 or 130.
    """
    args = recipe.training
    folder, asked = Path(args.output_dir), settings(recipe)
    with args.main_process_first():
        shorter = check_folder(folder, asked)
    with sole_writer(folder, "output_dir") if args.process_index == 0 else nullcontext():
        if (folder / "summary.json").exists() and shorter is None:
            logger.warning(
                "%s is over already; give a larger max_steps to go on with it, or another output_dir, or remove the "
                "folder to run it again",
                folder,
            )
            return summarize(logged_steps(folder))
        return _train(recipe, folder, asked, _resumed(args, folder, shorter))


def _resumed(args: CAPOConfig, folder: Path, shorter: int | None) -> str | None:
    """The checkpoint to go on from, if there is one; a run that is to be longer than it was needs it."""
    checkpoint = resume_point(folder)
    if shorter is not None:
        if checkpoint is None and (folder / "metrics.jsonl").exists():
            raise RunFolderError(
                f"output_dir={folder}: holds a run of {shorter} steps and no checkpoint, so it can't be made longer; "
                "give another folder, or remove this one"
            )
        schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        if not str(schedule).startswith("constant") and args.process_index == 0:
            logger.warning(
                "%s: a run of %d steps goes on to %d: from here its learning rate is that of the %s schedule of %d "
                "steps, so it jumps, and the run is not what one of %d steps from the start would have been",
                folder,
                shorter,
                args.max_steps,
                schedule,
                args.max_steps,
                args.max_steps,
            )
    if checkpoint is None and args.resume_from_checkpoint is not None:
        checkpoint = asked_point(args.resume_from_checkpoint)
    if checkpoint is not None:
        check_resumable(checkpoint)
    return checkpoint


def _train(recipe: Recipe, folder: Path, asked: dict[str, Any], checkpoint: str | None) -> dict[str, Any]:
    args = recipe.training
    if args.use_cpu and args.world_size > 1:  # transformers passes ddp_timeout on for other devices only
        torch.distributed.distributed_c10d._set_pg_timeout(args.ddp_timeout_delta)

    if args.save_only_model and args.process_index == 0:
        logger.warning(
            "%s: save_only_model: true writes checkpoints that no run can go on from, so one that is stopped is lost "
            "but for its weights, and it can't be made longer",
            folder,
        )
    trainer, dropped = make_trainer(recipe)
    record = Record(folder)
    trainer.add_callback(record)
    trainer.add_callback(FiniteWeights())
    stop = StopWhenTold()
    trainer.add_callback(stop)
    if trainer.is_world_process_zero():
        start_run(folder, asked)
        shutil.rmtree(folder / ASIDE, ignore_errors=True)  # of a run that was killed while it wrote
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        record.close()  # or its line of progress is drawn once more below an error's message

    if stop.told and trainer.state.global_step < trainer.state.max_steps:
        step = trainer.state.global_step
        after = "its weights are what is left" if args.save_only_model else "the same command goes on"
        logger.warning("%s: told to stop; step %d is in its checkpoint, and %s", folder, step, after)
        raise SystemExit(stop.status)
    if not trainer.is_world_process_zero():
        return {}
    entries = logged_steps(folder)
    summary = summarize(entries)
    if entries:
        draw_run(entries, folder / "curves.png", title=folder.name)
    else:
        logger.warning("%s: no step was logged, so there are no curves: see logging_strategy and logging_steps", folder)
    write_json(folder / "summary.json", summary | {"dropped": dropped, "settings": asked, "versions": versions()})
    return summary


def make_trainer(recipe: Recipe) -> tuple[CAPOTrainer, dict[str, int]]:
    """The trainer that a recipe asks for, with nothing printed a step, and how many problems were left out.

    Raises `DataError`, `ModelError` or `RecipeError` for what can't be trained; the data's errors come before the model
    loads.
    """
    args = recipe.training
    disable_progress_bars()
    disable_progress_bar()
    set_seed(args.seed)
    source = locate(recipe.model.model_name_or_path)
    if source.gguf_file and args.beta > 0:
        raise RecipeError(
            f"beta={args.beta}: the KL term loads the model a second time, which does not work from GGUF; "
            "convert it to safetensors, or set beta: 0.0"
        )
    if recipe.model.model_revision != "main":
        if os.path.isdir(source.name):
            raise RecipeError(
                f"model_revision={recipe.model.model_revision!r} would be ignored: {recipe.model.model_name_or_path} "
                "is here, and only a hub id has revisions; leave it out"
            )
        if args.beta > 0 and not recipe.model.use_peft:
            raise RecipeError(
                f"beta={args.beta}: the KL term loads the model a second time, at its main revision and not at "
                f"model_revision={recipe.model.model_revision!r}; set beta: 0.0, or give a folder with that revision"
            )
    problems = load_problems(
        recipe.data.dataset_name,
        config=recipe.data.dataset_config,
        split=recipe.data.dataset_train_split,
        limit=recipe.data.dataset_limit,
        seed=args.seed,
    )
    tokenizer = load_tokenizer(source, revision=recipe.model.model_revision)
    prompts, dropped = _prompts(recipe, problems, tokenizer)
    model: PreTrainedModel = load_model(
        source,
        dtype=recipe.model.dtype,
        attn_implementation=recipe.model.attn_implementation,
        revision=recipe.model.model_revision,
    )
    try:
        if args.fp16 and args.device.type == "cpu":
            raise ValueError("fp16=True would be ignored: Accelerate has it for accelerators only; use bf16: true")
        if args.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
            raise ImportError("use_liger_kernel needs liger-kernel: pip install liger-kernel")
        trainer = WholeCheckpoints(
            model=model,
            reward_funcs=constraint_reward if "constraints" in prompts.column_names else accuracy_reward,
            args=args,
            train_dataset=prompts,
            processing_class=tokenizer,
            peft_config=get_peft_config(recipe.model),
        )
        if "layerwise" not in args.optim:  # those are made with hooks on the model
            trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    except (ValueError, TypeError, ImportError, RuntimeError, NotImplementedError, OSError) as error:
        # settings that TRL, transformers or peft refuse, or whose library or vLLM server is missing
        raise RecipeError(f"{recipe.model.model_name_or_path} can't be trained so: {error}") from error
    if (name := recipe.model.model_name_or_path) == "embedded" or name.startswith("package:"):
        trainer.base_model = name
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer, dropped


def _prompts(recipe: Recipe, problems: Dataset, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, dict[str, int]]:
    """The problems that can be graded and are not too long, as prompts, and how many were left out."""
    ungradable = 0
    if "answer" in problems.column_names:
        problems, ungradable = drop_ungradable(problems, shared_grader())
    prompts = as_prompts(
        problems,
        conversational=tokenizer.chat_template is not None,
        system_prompt=recipe.data.system_prompt,
        suffix=recipe.data.prompt_suffix,
    )
    long = 0
    if recipe.data.max_prompt_length is not None:
        prompts, long = drop_long_prompts(prompts, tokenizer, recipe.data.max_prompt_length)
    if ungradable or long:
        logger.warning(
            "%s: left out %d problems whose gold answer can't be parsed, and %d longer than max_prompt_length=%s",
            recipe.data.dataset_name,
            ungradable,
            long,
            recipe.data.max_prompt_length,
        )
    if not len(prompts):
        raise DataError(
            f"{recipe.data.dataset_name}: no problem is left ({ungradable} can't be graded, {long} are too long); "
            "check the `answer` column and max_prompt_length"
        )
    return prompts, {"ungradable": ungradable, "too_long": long}


class Record(TrainerCallback):
    """Writes metrics.jsonl and shows how far the run is, in place of a dictionary a step."""

    def __init__(self, folder: Path) -> None:
        self.metrics = folder / "metrics.jsonl"
        self.progress: Progress | None = None
        self.last = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = time.perf_counter()
        if state.is_world_process_zero:
            rewind_metrics(self.metrics, state.global_step)
            self.progress = Progress(
                state.max_steps,
                Path(args.output_dir).name,
                "step",
                done=state.global_step,
                shown=not args.disable_tqdm,
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.progress is not None and not control.should_log:  # else with what is logged
            self.progress.update(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.progress is not None and logs:
            now = time.perf_counter()
            entry = {**logs, "step": state.global_step, "seconds": now - self.last}
            self.last = now
            write_metrics(self.metrics, [entry], append=True)
            self.progress.update(state.global_step, _postfix(logs))

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """End the line of progress; a second time does nothing."""
        if self.progress is not None:
            self.progress.close()


def _postfix(logs: Mapping[str, float]) -> str:
    shown = (
        ("reward", "reward", "{:.2f}"),
        ("rejected", "capo/rejection_rate", "{:.1%}"),
        ("KL", "capo/kl/measured", "{:.1e}"),
    )
    return " ".join(f"{name} {form.format(logs[key])}" for name, key, form in shown if logs.get(key) is not None)
