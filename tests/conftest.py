"""A language model small enough to train for a few steps in a test, and the trainers around it."""

from __future__ import annotations

import functools
import gc
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices are tiny; the other cores have other processes
if not shutil.which("nvidia-smi"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # where Triton is installed, its kernels run on the CPU

import jaxtyping

# Shapes in signatures are checked at run time; before any of these is imported. Not the kernels, whose source Triton
# reads, and not `trust_region`, which has a protocol and no tensors.
SHAPED = {
    "curvature": ("head", "last_layer", "processes", "reference", "selection", "shifts", "step", "step_model"),
    "planning": ("divergence", "micro_batch", "planner", "rerun", "share", "step_figures", "telemetry", "updates"),
}
jaxtyping.install_import_hook(
    [f"capo_rl.{room}.{name}" for room, names in SHAPED.items() for name in names], "shapes.checked"
)

import accelerate.utils.imports
import pytest
import torch
from datasets import Dataset
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from capo_rl import CAPOConfig, CAPOTrainer

settings.register_profile("no clock", deadline=None)  # an example may take long where the machine is busy
settings.load_profile("no clock")

# Accelerate reads the metadata of packages anew for each model that it looks at: a fifth of a tiny run's time.
accelerate.utils.imports._is_package_available = functools.cache(accelerate.utils.imports._is_package_available)


def pytest_collection_finish() -> None:
    """Accelerate collects garbage at the end of each run, and going through all that was imported is half of a tiny
    run's time: what is there now stays."""
    gc.collect()
    gc.freeze()


ROOT = Path(__file__).parents[1]  # of the repository
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(29))]


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def make_model(tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.5,  # far from uniform, so that tokens differ in their shifts
    )
    return LlamaForCausalLM(config)


def wants_even_words(completions: list[str], **kwargs) -> list[float]:
    """A reward that differs between completions: the share of even words."""
    return [
        sum(int(word[1:]) % 2 == 0 for word in words) / len(words)
        if (words := [word for word in text.split() if word.startswith("w")])
        else 0.0
        for text in completions
    ]


def prompts(count: int = 64) -> Dataset:
    return Dataset.from_list([{"prompt": f"w{i % 29} w{(3 * i) % 29} w{(7 * i + 1) % 29}"} for i in range(count)])


SETTINGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 6,
    "max_steps": 5,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "seed": 7,
}

# What a test of the mask, or of the figures, starts from: the paper's own method, measured on every completion.
PAPERS = {"capo_mode": "mask", "capo_share": False, "capo_kl_sample": 1.0}


@pytest.fixture
def unchecked():
    """Shapes are checked by our own code alone, as where the package is used."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def build(tmp_path: Path):
    """`build(trainer_class, model=..., **settings)`: a trainer on the tiny model."""

    def build(trainer=CAPOTrainer, config=CAPOConfig, model=None, rewards=wants_even_words, **settings):
        arguments = {key: settings.pop(key) for key in ("peft_config", "callbacks", "optimizers") if key in settings}
        model = make_model() if model is None else model
        settings = SETTINGS | (PAPERS if issubclass(config, CAPOConfig) else {}) | settings
        model.save_pretrained(tmp_path / "model")  # where TRL finds the reference policy when beta > 0
        model.config._name_or_path = str(tmp_path / "model")
        return trainer(
            model=model,
            reward_funcs=rewards,
            args=config(output_dir=str(tmp_path / "run"), **settings),
            train_dataset=prompts(),
            processing_class=make_tokenizer(),
            **arguments,
        )

    return build
