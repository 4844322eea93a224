"""On a GPU: the Triton kernels beside the plain and the materialised form, and a training step of TRL beside CAPO's.

    python benchmarks/on_gpu.py --stages kernels step [--out results/gpu] [--seconds 120] [--rehearse]

Each stage writes NAME.json as soon as it has something new to say, and leaves out what `--seconds` are too few for. A
stage that fails says so in one line, and in its JSON; the others go on, and the exit status is 1. `--rehearse` runs all
of it on the CPU with tiny sizes, the kernels in Triton's interpreter: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "--rehearse" in sys.argv:
    os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")

import torch
from torch import Tensor

from capo_rl.curvature.kernels import adam_shifts, moment_update, triton
from capo_rl.curvature.kernels.adam_shifts import adam_shifts as fused_shifts
from capo_rl.curvature.kernels.moment_update import fused_update_moments, update_moments
from capo_rl.curvature.last_layer import RowGradient, row_gradient
from capo_rl.runs.records import versions, write_json
from curvature import (
    DEVICE,
    Case,
    Materialised,
    copy_bandwidth,
    exact,
    extra_bytes,
    hardware,
    make_case,
    seconds,
)

REHEARSAL = "--rehearse" in sys.argv
REPEATS = 1 if REHEARSAL else 20


class Stage:
    """A stage's JSON, written anew with each `add`, and the time it has."""

    def __init__(self, name: str, folder: Path, allowed: float) -> None:
        self.path, self.start, self.stop = folder / f"{name}.json", time.monotonic(), time.monotonic() + allowed
        self.found: dict[str, Any] = {
            "versions": versions() | ({"triton": triton.__version__} if triton else {}),
            "hardware": hardware(),
            "rehearsal": REHEARSAL,
            "left_out": [],
        }

    def over(self, *next_up: str) -> bool:
        """Whether the time is up; then what would have been next is noted as left out."""
        if time.monotonic() < self.stop:
            return False
        self.found["left_out"].append(", ".join(next_up))
        return True

    def add(self, **more: Any) -> None:
        self.found |= more | {"seconds": time.monotonic() - self.start}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.found)


# --- kernels


@dataclass(frozen=True)
class Shape:
    """A model's last layer, and so many tokens of it: `tokens` for all forms, `in_dicts` for the paper's dicts."""

    d: int
    vocabulary: int
    tokens: int = 24 * 1024  # the paper's batch
    in_dicts: int = 1024  # a row at a time from Python


SHAPES = {
    "Qwen2.5-0.5B, the paper's": Shape(896, 151_936),
    "Qwen2.5-7B": Shape(3584, 152_064),
    "SmolLM2-135M": Shape(576, 49_152),
}
# Rows, columns and warps of a program; the first is what the package uses.
SHIFT_TILES = [
    (adam_shifts.ROWS, adam_shifts.COLUMNS, adam_shifts.WARPS),
    *((64, 64, 8), (64, 32, 4), (64, 128, 8), (32, 64, 4), (32, 128, 4), (16, 64, 4), (16, 128, 4), (16, 256, 4)),
    *((8, 128, 4), (8, 256, 4), (4, 512, 4), (2, 1024, 4), (16, 128, 8)),
]
UPDATE_TILES = [
    (moment_update.ENTRIES, moment_update.COLUMNS, moment_update.WARPS),
    *((16, 128, 2), (32, 128, 4), (64, 64, 4), (64, 128, 8), (16, 256, 4), (8, 512, 4), (32, 256, 8), (16, 64, 2)),
]
if REHEARSAL:
    SHAPES = {"tiny": Shape(20, 60, 6, 4)}
    SHIFT_TILES, UPDATE_TILES = SHIFT_TILES[:2], UPDATE_TILES[:2]
# How far the forms may be apart, over the largest: for d = 3584, E of kernels/adam_shifts.py is 2e-4.
APART = 1e-3


@torch.no_grad()
def kernels(stage: Stage) -> None:
    bandwidth = copy_bandwidth()
    stage.add(
        repeats=REPEATS,
        copy_bandwidth_bytes_per_second=bandwidth,
        tiles_in_use={"shifts": SHIFT_TILES[0], "update": UPDATE_TILES[0]},
        shapes={},
    )
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    for name, shape in SHAPES.items():
        if stage.over(name):
            continue
        case = make_case(shape.tokens, shape.d, shape.vocabulary)
        gradient = row_gradient(case.layer, case.weights)
        stage.found["shapes"][name] = found = {
            "tokens": shape.tokens,
            "k": case.layer.support.shape[1],
            "d": shape.d,
            "rows_with_moments": len(case.step.rows),
            "entries_of_the_commonest_row": int(gradient.start.diff().max()),
            "shifts": {},
            "update": {},
        }
        print(f"\n{name}: {shape.tokens} tokens, d = {shape.d}, {found['rows_with_moments']} rows with moments")
        _shifts(stage, found["shifts"], case, shape, bandwidth)
        _update(stage, found["update"], case, gradient, shape, bandwidth)
        stage.add()
        del case, gradient
        _free()
    for name, found in stage.found["shapes"].items():
        for what in ("shifts", "update"):
            for of, apart in found[what].get("fused_against_plain", {}).items():
                if not apart["over_the_largest"] < APART:
                    raise RuntimeError(f"{name}: {of} of the fused form is {apart} from the plain form's")


def _shifts(stage: Stage, found: dict[str, Any], case: Case, shape: Shape, bandwidth: float) -> None:
    moved = case.bytes()
    arguments = (
        *(case.advantages, case.layer.u, case.layer.pi, case.layer.missing_mass, case.layer.hidden, case.slots),
        *(*case.moments, case.step.planned),
    )
    found |= {"bytes": moved, "forms": {}, "tiles": []}

    def measured(name: str, work: Callable[[], object], tokens: int, repeats: int = REPEATS) -> None:
        try:
            took = seconds(work, repeats)
        except torch.OutOfMemoryError:
            found["forms"][name] = {"tokens": tokens, "error": "out of memory"}
            return
        found["forms"][name] = row = {
            "tokens": tokens,
            "seconds": took,
            "seconds_per_token": took / tokens,
            "extra_bytes": extra_bytes(work),
        }
        if tokens == shape.tokens:
            row["fraction_of_copy_bandwidth"] = {what: size / took / bandwidth for what, size in moved.items()}
        _say(f"shifts, {name}", row)
        stage.add()

    plain = case.plain()
    measured("plain", case.plain, shape.tokens)
    if triton:
        s, c = fused_shifts(*arguments)
        found["fused_against_plain"] = {"s": _apart(s, plain.s), "c": _apart(c, plain.c)}
        print(f"  fused against plain: {found['fused_against_plain']}")
        measured("fused", lambda: fused_shifts(*arguments), shape.tokens)
    some = torch.arange(0, shape.tokens, max(1, shape.tokens // 128), device=DEVICE)
    exact_s, exact_c = exact(case.layer[some], case.advantages[some], case.step)
    found["against_float64"] = {"plain": {"s": _apart(plain.s[some], exact_s), "c": _apart(plain.c[some], exact_c)}}
    if triton:
        found["against_float64"]["fused"] = {"s": _apart(s[some], exact_s), "c": _apart(c[some], exact_c)}
    for tile in SHIFT_TILES if triton else []:
        if not stage.over("shifts, a tile of", str(tile)):
            found["tiles"].append(
                _tile(tile, lambda t=tile: fused_shifts(*arguments, tile=t), lambda t: _apart(t[0], plain.s))
            )
    _best("shifts", found["tiles"])
    # the paper's way: on as many tokens as fit
    _free()
    fit = min(shape.tokens, _tokens_that_fit(case))
    part = case.layer[torch.arange(fit, device=DEVICE)]
    paper = Materialised(shape.d)
    paper.steps = case.step.steps
    stored = (*case.moments, case.slots[:fit])
    if not stage.over("shifts, materialised, moments in tensors"):
        measured(
            "materialised, moments in tensors",
            lambda: paper.shifts_of_stored(part, case.advantages[:fit], *stored),
            fit,
            min(REPEATS, 10),
        )
    _free()
    if not stage.over("shifts, materialised, moments in dicts"):
        few = _few(shape)
        paper = Materialised.of(few)
        measured(
            "materialised, moments in dicts",
            lambda: paper.shifts(few.layer, few.advantages),
            shape.in_dicts,
            min(REPEATS, 3),
        )
    if triton:
        fused = found["forms"]["fused"]["seconds_per_token"]
        for row in found["forms"].values():
            if "seconds" in row:
                row["times_fused_per_token"] = row["seconds_per_token"] / fused


def _update(
    stage: Stage, found: dict[str, Any], case: Case, gradient: RowGradient, shape: Shape, bandwidth: float
) -> None:
    p, q = case.moments
    slots, betas = case.step.slots(gradient.rows), case.step.betas
    # P and Q read and written, the tokens, and a weight and a number for each entry
    moved = {
        "each row once": 4 * p.nbytes + gradient.hidden.nbytes + gradient.tokens.nbytes + gradient.values.nbytes,
        "a gather for every entry": 4 * p.nbytes + len(gradient.tokens) * shape.d * gradient.hidden.element_size(),
    }
    found |= {"bytes": moved, "forms": {}, "tiles": []}

    def measured(name: str, work: Callable[[], object], tokens: int, repeats: int = REPEATS) -> None:
        took = seconds(work, repeats)
        row: dict[str, Any] = {"tokens": tokens, "seconds": took, "extra_bytes": extra_bytes(work)}
        if tokens == shape.tokens:
            row["fraction_of_copy_bandwidth"] = {what: size / took / bandwidth for what, size in moved.items()}
        found["forms"][name] = row
        _say(f"update, {name}", row)
        stage.add()

    def by_plain(p: Tensor, q: Tensor) -> None:
        update_moments(p, q, slots, gradient, 1.0, betas, seed=0)

    def by_triton(p: Tensor, q: Tensor, tile: tuple[int, int, int] = UPDATE_TILES[0]) -> None:
        fused_update_moments(p, q, slots, gradient, 1.0, betas, tile)

    def after(form: Callable[..., None], *tile: Any) -> tuple[Tensor, Tensor]:
        moved_p, moved_q = p.clone(), q.clone()
        form(moved_p, moved_q, *tile)
        return moved_p, moved_q

    plain_p, plain_q = after(by_plain)
    # a clone to work on, over and over: its values do not change the cost
    own_p, own_q = p.clone(), q.clone()
    measured("plain", lambda: by_plain(own_p, own_q), shape.tokens)
    if triton:
        fused_p, fused_q = after(by_triton)
        found["fused_against_plain"] = {"p": _apart(fused_p, plain_p), "q": _apart(fused_q, plain_q)}
        print(f"  fused against plain: {found['fused_against_plain']}")
        measured("fused", lambda: by_triton(own_p, own_q), shape.tokens)
        for tile in UPDATE_TILES:
            if not stage.over("update, a tile of", str(tile)):
                row = _tile(tile, lambda t=tile: by_triton(own_p, own_q, t))
                row["apart"] = _apart(after(by_triton, tile)[0], plain_p)
                found["tiles"].append(row)
        _best("update", found["tiles"])
    if not stage.over("update, materialised, moments in dicts"):
        few = _few(shape)
        paper = Materialised.of(few)
        measured(
            "materialised, moments in dicts",
            lambda: paper.update(few.layer, few.weights),
            shape.in_dicts,
            min(REPEATS, 2),
        )


def _few(shape: Shape) -> Case:
    """Few tokens of the same kind, for the paper's dicts."""
    return make_case(shape.in_dicts, shape.d, shape.vocabulary)


def _tile(
    tile: tuple[int, int, int], work: Callable[[], Any], apart: Callable[[Any], dict[str, float]] | None = None
) -> dict[str, Any]:
    """The seconds of one tile, or why there are none: a tile may have no room on a card."""
    try:
        row: dict[str, Any] = {"tile": tile, "seconds": seconds(work, REPEATS)}
        if apart:
            row["apart"] = apart(work())
        return row
    except Exception as error:
        return {"tile": tile, "error": f"{type(error).__name__}: {error}"[:300]}


def _best(what: str, rows: list[dict[str, Any]]) -> None:
    """Print the tiles, the fastest first."""
    for row in sorted((row for row in rows if "seconds" in row), key=lambda row: row["seconds"])[:4]:
        print(f"  {what}, tile {row['tile']!s:20}{1e3 * row['seconds']:10.3f} ms", flush=True)
    for row in rows:
        if "error" in row:
            print(f"  {what}, tile {row['tile']}: {row['error'].splitlines()[0]}", flush=True)


def _apart(one: Tensor, other: Tensor) -> dict[str, float]:
    """How far one is from the other at most: over the largest, and over each that isn't tiny beside the largest."""
    difference, size = (one.double() - other.double()).abs(), other.double().abs()
    counted = size > 1e-3 * size.max()
    return {
        "over_the_largest": float(difference.max() / size.max()),
        "over_each": float((difference[counted] / size[counted]).max()),
    }


def _tokens_that_fit(case: Case) -> int:
    """How many tokens the materialised way has room for: it holds up to a dozen tensors of tokens · k · d."""
    room = 0.8 * torch.cuda.mem_get_info()[0] if DEVICE.type == "cuda" else 2**30
    return max(1, int(room / (12 * 4 * case.layer.support.shape[1] * case.layer.hidden.shape[1])))


def _say(what: str, row: dict[str, Any]) -> None:
    shares = ", ".join(f"{share:.0%}" for share in row.get("fraction_of_copy_bandwidth", {}).values())
    time_and_memory = (
        f"{1e3 * row['seconds']:10.3f} ms of {row['tokens']:6} tokens {row['extra_bytes'] / 2**20:10.1f} MiB"
    )
    print(f"  {what:42}{time_and_memory}  {shares}", flush=True)


def _free() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


# --- a step


@dataclass(frozen=True)
class Model:
    """Qwen2.5's shape, with random weights in bfloat16."""

    d: int
    feed_forward: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int = 151_936


MODELS = {
    "Qwen2.5-0.5B": Model(896, 4864, 24, 14, 2),
    "Qwen2.5-1.5B": Model(1536, 8960, 28, 12, 2),
}
COMPLETIONS, LENGTH, MICRO_BATCHES = 96, 512, (24, 12, 6)  # the largest that fits all modes
if REHEARSAL:
    MODELS = {name: Model(32, 64, 2, 2, 1, vocabulary=300) for name in MODELS}
    COMPLETIONS, LENGTH, MICRO_BATCHES = 8, 6, (4,)
# Thresholds are open, so the mask leaves nothing out. One step in ten is logged, and its KL measured, by default; a
# trust region measures that of every step.
OPEN = {"capo_fisher_threshold": None, "capo_hessian_low": None, "capo_hessian_high": None}
MODES: dict[str, dict[str, Any] | None] = {
    "TRL's GRPOTrainer": None,
    "CAPO, off": {"capo_mode": "off"},
    "CAPO, monitor": {"capo_mode": "monitor"},
    "CAPO, mask": {"capo_mode": "mask"},
    "CAPO, trust region": {"capo_mode": "trust_region"},
    "CAPO, trust region, watched": {"capo_mode": "trust_region", "capo_watch": True},
}
WARM_UP, STEPS, LOGGED = 3, 12, 3  # steps that are not counted, all steps, and which are logged: every so many
LOGGED_BY_DEFAULT = 10


def step(stage: Stage) -> None:
    stage.add(
        completions=COMPLETIONS,
        length=LENGTH,
        steps=STEPS - WARM_UP,
        note="random weights in bfloat16, the head untied and with Zipf's law in one of its columns; no generation",
        models={},
    )
    for number, (name, model) in enumerate(MODELS.items()):
        now = time.monotonic()
        until = now + (stage.stop - now) / (len(MODELS) - number)
        for micro_batch in MICRO_BATCHES:
            print(f"\n{name}: {COMPLETIONS} completions of {LENGTH} tokens, {micro_batch} at a time", flush=True)
            stage.found["models"][name] = found = {"micro_batch": micro_batch, "modes": {}}
            if fits := _modes(stage, name, model, micro_batch, until, found["modes"]):
                break
            _free()
        if not fits:
            raise RuntimeError(f"{name}: {MICRO_BATCHES[-1]} completions at a time are too many for the card")


def _modes(stage: Stage, name: str, model: Model, micro_batch: int, until: float, found: dict[str, Any]) -> bool:
    """Train in each mode; whether the card had room."""
    for i, mode in enumerate(MODES):
        now = time.monotonic()
        if stage.over(name, mode):
            continue
        try:
            found[mode] = _train(model, MODES[mode], micro_batch, now + (until - now) / (len(MODES) - i))
        except torch.OutOfMemoryError:
            return False
        _compare(found, mode)
        stage.add()
        _free()
    return True


def _compare(found: dict[str, Any], mode: str) -> None:
    """Set a mode beside TRL, and print it."""
    row, its = found[mode], found[next(iter(MODES))]
    print(f"  {mode:20}", end="")
    for kind, figures in row["median"].items():
        if kind in its["median"]:
            figures["over_trl"] = figures["seconds"] / its["median"][kind]["seconds"]
            print(f" {kind} {figures['seconds']:.4f} s, {figures['over_trl']:.3f} of TRL's", end=";")
    print(f" curvature {row['share_of_curvature']:.2%}, peak {row['peak_bytes'] / 2**30:.1f} GiB", flush=True)


def _train(model: Model, mode: dict[str, Any] | None, micro_batch: int, deadline: float) -> dict[str, Any]:
    """Some steps of one trainer: their seconds, without the making of completions, what CAPO took of them, memory."""
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from capo_rl import CAPOConfig, CAPOTrainer

    steps: list[dict[str, Any]] = []
    ids = _completions(model)

    class Timed(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.start = _now()
            steps.append({"made": 0.0})

        def on_step_end(self, args, state, control, **kwargs):
            own = _now() - self.start - steps[-1]["made"]
            steps[-1] |= {"seconds": own, "logged": state.global_step % LOGGED == 0}
            # a step more must fit, and one that is logged is needed
            if state.global_step >= 2 * LOGGED and time.monotonic() + 2 * own > deadline:
                control.should_training_stop = True

    class Given:
        """Completions are given, and what making them takes is noted."""

        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
            return ids[: len(prompt_ids)], None

        def _generate_and_score_completions(self, inputs):
            start = _now()
            output = super()._generate_and_score_completions(inputs)
            steps[-1]["made"] += _now() - start
            return output

    class Trl(Given, GRPOTrainer):
        pass

    class Capo(Given, CAPOTrainer):
        def record_figures(self, figures):
            for name in ("capo/seconds", "capo/kl/seconds"):
                steps[-1][name] = steps[-1].get(name, 0.0) + figures.get(name, 0.0)
            super().record_figures(figures)

    draw = torch.Generator().manual_seed(0)

    def rewards(completions: list[str], **kwargs: Any) -> list[float]:
        return torch.rand(len(completions), generator=draw).tolist()

    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": COMPLETIONS // micro_batch,
            "num_generations": 4 if REHEARSAL else 8,
            "max_completion_length": LENGTH,
            "max_steps": STEPS,
            "learning_rate": 1e-6,
            "lr_scheduler_type": "constant",
            "beta": 0.0,
            "logging_steps": LOGGED,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": not REHEARSAL,
            "use_cpu": DEVICE.type == "cpu",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,  # a batch is a list of texts
        }
        arguments: dict[str, Any] = {
            "model": _random_model(model, folder),
            "reward_funcs": rewards,
            "train_dataset": _prompts(),
            "processing_class": _tokenizer(),
            "callbacks": [Timed()],
        }
        trainer: GRPOTrainer
        if mode is None:
            trainer = Trl(args=GRPOConfig(**settings), **arguments)
        else:
            trainer = Capo(args=CAPOConfig(**settings, **OPEN, **mode), **arguments)
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with _quiet():
            trainer.train()
        peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
        planner = getattr(trainer, "planner", None)
        rows = len(planner.step.rows) if planner else 0
        trainer.accelerator.free_memory()
    counted = [each for each in steps[WARM_UP:] if "seconds" in each]
    return _summary(counted) | {"peak_bytes": peak, "rows_with_moments": rows, "steps": steps}


def _summary(counted: list[dict[str, Any]]) -> dict[str, Any]:
    median: dict[str, Any] = {}
    for kind, of in (("plain steps", False), ("logged steps", True)):
        chosen = [each for each in counted if each["logged"] == of]
        if chosen:
            median[kind] = {
                name: statistics.median(each.get(key, 0.0) for each in chosen)
                for name, key in (
                    ("seconds", "seconds"),
                    ("seconds_of_curvature", "capo/seconds"),
                    ("seconds_of_kl", "capo/kl/seconds"),
                )
            }
    if len(median) == 2:  # as TRL logs by default
        plain, logged = median.values()
        median["one in ten logged"] = {
            name: plain[name] + (logged[name] - plain[name]) / LOGGED_BY_DEFAULT for name in plain
        }
    last = list(median.values())[-1] if median else {}
    took = (last["seconds_of_curvature"] + last["seconds_of_kl"]) / last["seconds"] if last else float("nan")
    return {"median": median, "share_of_curvature": took, "steps_counted": len(counted)}


def _now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _random_model(model: Model, folder: str) -> Any:
    """Random weights with a policy like that of a trained model: Zipf's law over the rows, and what a context adds.

    The first dimension of every embedding is large, so that of every hidden state is 1 after the last norm, and there
    the head's rows hold the logarithm of Zipf's frequencies; the other dimensions move a logit by 3 or so. A flat
    policy would touch every row of the vocabulary, one without a context always the same rows.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=model.vocabulary,
        hidden_size=model.d,
        intermediate_size=model.feed_forward,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.key_value_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        network = Qwen2ForCausalLM(config).to(torch.float32 if REHEARSAL else torch.bfloat16)
    with torch.no_grad():
        network.model.embed_tokens.weight[:, 0] = 10.0
        network.model.norm.weight[0] = model.d**-0.5
        network.lm_head.weight[:, 0] = -(torch.arange(model.vocabulary, device=DEVICE) + 2.7).log()
        hidden = network.model(torch.randint(model.vocabulary, (4, 64), device=DEVICE))[0][..., 1:].flatten(0, 1)
        logits = hidden.float() @ network.lm_head.weight[:1024, 1:].float().T
        network.model.norm.weight[1:] *= 3 / logits.std(0).mean()
    network.config._name_or_path = folder
    return network


def _completions(model: Model) -> list[list[int]]:
    """Completions of full length whose tokens follow Zipf's law; the first three ids are special."""
    draw = torch.Generator().manual_seed(0)
    frequencies = 1 / (torch.arange(model.vocabulary - 3) + 5.7)
    return (frequencies.multinomial(COMPLETIONS * LENGTH, True, generator=draw) + 3).view(COMPLETIONS, LENGTH).tolist()


def _tokenizer() -> Any:
    """It knows the prompts' words only."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(29))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def _prompts() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": f"w{i % 29} w{(3 * i) % 29} w{(7 * i + 1) % 29}"} for i in range(256)])


def _quiet() -> Any:
    """Keep the trainers' own lines out of the output, of which only the end comes back from a lent machine."""
    return contextlib.redirect_stdout(io.StringIO())


# --- stages

STAGES: dict[str, Callable[[Stage], None]] = {"kernels": kernels, "step": step}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    parser.add_argument("--seconds", type=float, default=120, help="of each stage (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    args = parser.parse_args()
    if DEVICE.type == "cpu" and not args.rehearse:
        parser.error("there is no GPU; --rehearse runs all of it on the CPU")
    failed = []
    for name in args.stages:
        stage = Stage(name, args.out, args.seconds)
        try:
            STAGES[name](stage)
            stage.add(complete=not stage.found["left_out"])
        except Exception as error:
            failed.append(name)
            why = traceback.format_exc()
            print(f"stage {name} failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}", file=sys.stderr)
            with contextlib.suppress(OSError):  # which may be the reason
                stage.add(complete=False, error=why)
        _free()
        print(f"{name}: {time.monotonic() - stage.start:.0f} s, {stage.path}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
