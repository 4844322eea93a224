"""Completions of prompts: by vLLM where it is installed and a GPU is there, by transformers otherwise.

Both take and return token ids, and both are seeded by the caller, so that a batch done again comes out the same.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from capo_rl.runs.models import ModelError, ModelSource, load_model, load_tokenizer, locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FIRST_SPAN = 128  # tokens after which the rows of a batch that have ended are left out for the first time


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from the policy; a temperature of 0 is greedy decoding."""

    temperature: float
    top_p: float
    max_new_tokens: int


class Completion(NamedTuple):
    """Token ids, with the one that ended the completion; truncated if none did."""

    ids: list[int]
    truncated: bool


# Prompts, the seed of each, and the sampling, to one completion a prompt.
Generate = Callable[[Sequence[list[int]], Sequence[int], Sampling], list[Completion]]


@dataclass(frozen=True)
class Generator:
    """A loaded model.

    context     the most tokens it can read; `None` where the backend sees to that
    batch_size  prompts that are well given to `generate` at a time
    """

    tokenizer: PreTrainedTokenizerBase
    context: int | None
    batch_size: int
    generate: Generate


def seed_of(*parts: object) -> int:
    """A seed that depends on all parts and on nothing else, not on the process.

    >>> seed_of(0, "gsm8k/test/0", 0)
    1647576022
    """
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4]) >> 1


def choose_backend(name: str) -> str:
    """`vllm` or `transformers`, without loading anything; vLLM isn't asked to read GGUF or adapters.

    Raises `ModelError` as `locate`.
    """
    if _is_adapter(name) or locate(name).gguf_file or not importlib.util.find_spec("vllm"):
        return "transformers"
    import torch

    return "vllm" if torch.cuda.is_available() else "transformers"


def load_generator(name: str, backend: str) -> Generator:
    """Load a model, or a LoRA adapter's folder: the model that it adapts, with the adapter merged into it.

    Raises `ModelError` if either is not there or does not load.
    """
    if backend == "vllm":
        return _vllm(locate(name))
    model, tokenizer = _adapted(Path(name).expanduser()) if _is_adapter(name) else _loaded(locate(name))
    return _transformers(model, tokenizer)


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Each prompt as the user's turn of the model's chat template, or as it is where the model has none.

    Raises `ModelError` for text that the tokenizer has no tokens for.
    """
    try:
        if tokenizer.chat_template is None:
            return tokenizer(list(prompts))["input_ids"]
        return tokenizer.apply_chat_template(
            [[{"role": "user", "content": prompt}] for prompt in prompts],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )["input_ids"]
    except Exception as error:  # a tokenizer without a token for the unknown raises a bare Exception
        raise ModelError(
            f"the model's tokenizer can't read these prompts ({str(error)[:200]}); choose another model"
        ) from error


def _is_adapter(name: str) -> bool:
    return Path(name, "adapter_config.json").expanduser().is_file()


def _loaded(source: ModelSource) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    gpu = torch.cuda.is_available()
    model = load_model(source, dtype=torch.bfloat16 if gpu else torch.float32)
    return model.to("cuda" if gpu else "cpu"), load_tokenizer(source)


def _adapted(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{folder}: an adapter without adapter_model.safetensors; save it as safetensors")
    try:
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (ValueError, KeyError):
        raise ModelError(f"{folder}: its adapter_config.json names no base_model_name_or_path") from None
    from peft import PeftModel

    model, tokenizer = _loaded(locate(base))
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload(), tokenizer


def _transformers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Generator:
    from transformers import GenerationConfig

    model.eval()
    ends = _end_tokens(model.generation_config.eos_token_id, tokenizer)
    # The model's own repetition_penalty, say, would be filled in where a call leaves it open.
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)

    def generate(prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        import torch

        # One stream of random numbers for the batch: its completions are the same whenever its rows are.
        torch.manual_seed(seed_of(*seeds))
        draw = (
            {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
            if sampling.temperature
            else {"do_sample": False}
        )
        completions: list[list[int]] = [[] for _ in prompts]
        going, done, span = list(range(len(prompts))), 0, _FIRST_SPAN
        # In spans, each twice as long as the one before: a row that has ended is left out of the next one, so that one
        # long answer does not hold up a whole batch. What is read again costs little beside what is written.
        while going and done < sampling.max_new_tokens:
            span = min(span, sampling.max_new_tokens - done)
            texts = tokenizer.pad({"input_ids": [prompts[i] + completions[i] for i in going]}, return_tensors="pt")
            with torch.inference_mode():
                ids = model.generate(**texts.to(model.device), max_new_tokens=span, **draw)
            for i, row in zip(going, ids[:, texts["input_ids"].shape[1] :].tolist(), strict=True):
                end = next((at for at, token in enumerate(row, 1) if token in ends), len(row))
                completions[i] += row[:end]
            going = [i for i in going if completions[i][-1] not in ends]
            done, span = done + span, 2 * span
        return [Completion(ids, truncated=i in going) for i, ids in enumerate(completions)]

    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Generator(tokenizer, context, batch_size=32, generate=generate)


def _vllm(source: ModelSource) -> Generator:
    """vLLM, seeded a request; it makes its own batches. Not yet run on a GPU: only against a stand-in for the library.

    There its completions may differ a little from run to run, because the batches differ and with them the rounding.
    """
    from vllm import LLM, SamplingParams

    tokenizer = load_tokenizer(source)
    # `generation_config="vllm"` leaves out the model's own sampling defaults.
    llm = LLM(model=source.name, load_format="safetensors", generation_config="vllm", trust_remote_code=False)
    ends = _end_tokens(_hub_end_tokens(source), tokenizer)

    def generate(prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        requests = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=ends,
                seed=seed,
            )
            for seed in seeds
        ]
        answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], requests, use_tqdm=False)
        outputs = [answer.outputs[0] for answer in answers]
        return [Completion(list(output.token_ids), output.finish_reason == "length") for output in outputs]

    return Generator(tokenizer, None, batch_size=1024, generate=generate)


def _hub_end_tokens(source: ModelSource) -> int | list[int] | None:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(source.name).eos_token_id
    except OSError:  # not every model has the file
        return None


def _end_tokens(configured: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The model's end tokens and the tokenizer's: chat models often end a turn with the one, a text with the other."""
    ends = [] if configured is None else [configured] if isinstance(configured, int) else list(configured)
    return sorted({*ends, tokenizer.eos_token_id} - {None})
