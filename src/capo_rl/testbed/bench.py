"""`capo bench`: a grid of runs from one YAML file, resumable run by run, with small results to draw figures from.

recipe: quickstart.yaml            the recipe that all arms share, a path beside the bench file
common: {learning_rate: 5e-4}      fields of the recipe for all arms
seeds: [11, 12, 13, 14, 15]
test: {terms: 8, problems: 128, every: 25}      accuracy on a held-out, harder set while training (`held_out.HeldOut`)
arms:                              one set of fields an arm; `rival` puts another mask in CAPO's place, `adapt` is the
                                   rate of an `AdaptThresholds`, `train_only` a regular expression for the names of the
                                   weights that learn; `scales`, `second_moment` and `sign` are of `interventions`,
                                   `judge` of `judgements`, `lag` and `drift` of `off_policy`
  GRPO (A): {}
  random mask: {rival: {name: random, rate: 0.02}}
grid:                              more arms: every combination of one entry of each
  - {CAPO: {loss_type: grpo}, Dr.CAPO: {loss_type: dr_grpo}}
  - {δ_F 1e-4: {capo_fisher_threshold: 1e-4}, δ_F 1e-5: {capo_fisher_threshold: 1e-5}}
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from capo_rl.runs.progress import Progress
from capo_rl.runs.records import column, read_metrics, versions, write_json
from capo_rl.settings.packaged import packaged
from capo_rl.settings.strict_yaml import load_yaml

# What of each step is kept: enough for every figure, and no more.
CURVES = (
    "step",
    "capo/completions",
    "reward",
    "entropy",
    "capo/rejection_rate",
    "capo/rejection_rate/positive",
    "capo/rejection_rate/negative",
    "capo/token/m_f/mean",
    "capo/token/m_f/q99",
    "capo/token/m_h/mean",
    "capo/batch/m_f",
    "capo/batch/m_h",
    "capo/kl/measured",
    "capo/kl/proposed",
    "capo/kl/whole",
    "capo/kl/predicted",
    "capo/kl/rank_correlation",
    "capo/kl/fraction",
    "capo/learning_rate",
    "capo/scale",
    "capo/share",
    "capo/accepted_tokens",
    "capo/thresholds/fisher",
    "grad_norm",
    "off_policy/kl",
    "off_policy/rejected",
)
BESIDE = (
    "rival",
    "adapt",
    "train_only",
    "scales",
    "second_moment",
    "sign",
    "judge",
    "lag",
    "drift",
)  # of an arm, and no fields of a recipe
_FIELDS = {"recipe", "common", "seeds", "test", "arms", "grid"}


class BenchError(ValueError):
    """A bench file that can't be used; the message names the field and the fix."""


@dataclass(frozen=True)
class Bench:
    """A grid of runs: each arm's fields on top of a shared recipe, for each of the seeds."""

    name: str
    recipe: str
    arms: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    test: dict[str, int] = field(default_factory=dict)


def read_bench(path: str | Path) -> Bench:
    """Read a bench file.

    Raises `BenchError` for one that is missing, malformed, or has no arms.
    """
    path = Path(path)
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        ours = ", ".join(sorted(packaged("experiments").keys() - {"recipe"}))
        raise BenchError(f"{path}: no such file; give the path of a YAML file, or one of {ours}") from None
    except yaml.YAMLError as error:
        raise BenchError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or not {"recipe", "seeds"} <= content.keys():
        raise BenchError(f"{path}: needs the fields recipe, seeds, and arms or grid")
    if unknown := content.keys() - _FIELDS:
        raise BenchError(f"{path}: no field {', '.join(sorted(unknown))}; there are {', '.join(sorted(_FIELDS))}")
    common = content.get("common") or {}
    arms = {name: common | (fields or {}) for name, fields in (content.get("arms") or {}).items()}
    if content.get("grid"):
        for combination in product(*(axis.items() for axis in content["grid"])):
            fields = dict(common)
            for _, more in combination:
                fields |= more
            arms[", ".join(name for name, _ in combination)] = fields
    if not arms:
        raise BenchError(f"{path}: no arms; write some under `arms` or `grid`")
    slugs = [slug(name) for name in arms]
    if len(set(slugs)) < len(slugs):
        raise BenchError(f"{path}: two arms have the same folder name; the names differ in punctuation only")
    return Bench(
        path.stem, str(path.parent / content["recipe"]), arms, tuple(content["seeds"]), content.get("test") or {}
    )


def quick(bench: Bench, steps: int = 20) -> Bench:
    """The same arms for one seed and a few steps: it shows that they run, and nothing of how they compare."""
    arms = {name: fields | {"max_steps": steps} for name, fields in bench.arms.items()}
    return replace(bench, name=f"{bench.name}-quick", arms=arms, seeds=bench.seeds[:1], test={})


def slug(name: str) -> str:
    """An arm's folder.

    >>> slug("Dr.GRPO (A), δ_F 1e-4")
    'dr.grpo-a-δ_f-1e-4'
    """
    return re.sub(r"[^\w.+-]+", "-", name.lower()).strip("-")


def run_bench(
    bench: Bench,
    results: Path,
    *,
    seeds: int | None = None,
    only: Iterable[str] = (),
    workers: int | None = None,
) -> list[Path]:
    """Do the runs that have no result yet, `workers` at a time on one thread each; returns every result's path.

    `seeds` takes the first so many; `only` names the arms to run. A run that fails is reported when all are done.

    Raises `BenchError` for arms that do not exist, and `RuntimeError` if a run failed.
    """
    only = list(only)
    if unknown := [name for name in only if name not in bench.arms]:
        raise BenchError(f"{bench.name}: no arm {', '.join(unknown)}; there are {', '.join(bench.arms)}")
    wanted = [
        (arm, seed, results / bench.name / slug(arm) / f"{seed}.json")
        for seed in bench.seeds[:seeds]  # seed by seed: a bench that is stopped has compared all arms on some seeds
        for arm in (only or bench.arms)
    ]
    missing = [run for run in wanted if not run[2].exists()]
    failed: dict[str, BaseException] = {}
    there = len(wanted) - len(missing)
    with (
        ProcessPoolExecutor(workers or os.cpu_count(), multiprocessing.get_context("spawn"), _one_thread) as pool,
        closing(Progress(len(wanted), bench.name, "run", done=there)) as progress,
    ):
        futures: dict[Future[None], str] = {
            pool.submit(_run, bench, arm, seed, path): f"{arm}, seed {seed}" for arm, seed, path in missing
        }
        for done, future in enumerate(as_completed(futures), start=there + 1):
            progress.update(done, futures[future])
            if (error := future.exception()) is not None:
                failed[futures[future]] = error
    if failed:
        name, error = next(iter(failed.items()))
        raise RuntimeError(f"{len(failed)} of {len(missing)} runs failed; the first was {name}") from error
    return [path for _, _, path in wanted]


def _one_thread() -> None:
    """Prepare a worker: one thread, quiet, and gone when the process that started it is."""
    import threading
    import warnings

    import torch
    from transformers.utils.logging import set_verbosity_error

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    set_verbosity_error()
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run(bench: Bench, arm: str, seed: int, path: Path) -> None:
    """One run, from nothing to its result."""
    from capo_rl.settings.recipe import read_recipe, settings
    from capo_rl.testbed.held_out import HeldOut
    from capo_rl.testbed.interventions import Scales, WholeSecondMoment, one_sign
    from capo_rl.testbed.judgements import judge
    from capo_rl.testbed.off_policy import Lag, drift
    from capo_rl.testbed.rivals import rival
    from capo_rl.thresholds.adapt import AdaptThresholds
    from capo_rl.trainers.train import Record, make_trainer

    fields = dict(bench.arms[arm])
    beside = {name: fields.pop(name, None) for name in BESIDE}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe_file = folder / "recipe.yaml"
        shared = load_yaml(Path(bench.recipe).read_text(encoding="utf-8"))
        fixed = {"seed": seed, "output_dir": str(folder / "run"), "save_strategy": "no", "disable_tqdm": True}
        recipe_file.write_text(yaml.safe_dump(shared | fields | fixed), encoding="utf-8")
        recipe = read_recipe(str(recipe_file))
        trainer, _ = make_trainer(recipe)
        if beside["train_only"] is not None:
            for name, weight in trainer.model.named_parameters():
                weight.requires_grad_(re.search(beside["train_only"], name) is not None)
        if beside["rival"] is not None and trainer.planner is not None:
            trainer.planner.rule = rival(**beside["rival"], seed=seed)
        if beside["adapt"] is not None:
            trainer.add_callback(AdaptThresholds(trainer, beside["adapt"]))
        if beside["sign"] is not None and trainer.planner is not None:
            trainer.planner.rule = one_sign(trainer.planner.thresholds, beside["sign"])
        if beside["judge"] is not None:
            judge(trainer, beside["judge"])
        if beside["second_moment"]:
            trainer.add_callback(WholeSecondMoment(trainer))
        if beside["scales"] is not None:
            trainer.add_callback(Scales(_scales(bench, seed, path.parents[2], **beside["scales"])))
        if beside["lag"] is not None:
            trainer.add_callback(Lag(trainer, **beside["lag"]))
        if beside["drift"] is not None:
            drift(trainer, **beside["drift"])
        if trainer.args.kl_budget is not None and trainer.args.capo_kl_sample < 1 and trainer.planner is not None:
            _audit(trainer)
        generation = _timed(trainer, "_generate_and_score_completions")
        test = HeldOut(trainer, recipe.data.dataset_name, **bench.test) if bench.test else None
        if test is not None:
            trainer.add_callback(test)
        trainer.add_callback(Record(folder))
        start = time.perf_counter()
        trainer.train()
        total = time.perf_counter() - start
        entries = read_metrics(folder)
    asked = {name: value for name, value in settings(recipe).items() if name not in fixed}
    seconds = {
        "total": total,
        "generation": sum(generation),
        "curvature": sum(column(entries, "capo/seconds")),
        "kl": sum(column(entries, "capo/kl/seconds")),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "bench": bench.name,
            "arm": arm,
            "seed": seed,
            "settings": asked | {name: value for name, value in beside.items() if value is not None},
            "versions": versions(),
            "hardware": _hardware(trainer.accelerator.device),
            "curves": {name: [_short(entry.get(name)) for entry in entries] for name in CURVES},
            "test": test.found if test is not None else {"capo/completions": [], "accuracy": []},
            "seconds": seconds,
        },
        indent=None,
    )


def _scales(bench: Bench, seed: int, results: Path, of: str, arm: str, how: str) -> list[float]:
    """The lengths of the steps of an arm of the bench `of`: those of its run with the next seed (`yoked`), or at every
    step the mean over its runs and their steps (`constant`).

    Raises `BenchError` where those runs have no results yet.
    """
    from capo_rl.testbed.interventions import applied_scales

    after = bench.seeds[(bench.seeds.index(seed) + 1) % len(bench.seeds)]
    runs = [results / of / slug(arm) / f"{each}.json" for each in ([after] if how == "yoked" else bench.seeds)]
    if missing := [run for run in runs if not run.exists()]:
        raise BenchError(f"{bench.name}: {missing[0]} is missing; run `capo bench {of} --only '{arm}'` first")
    scales = [applied_scales(json.loads(run.read_text(encoding="utf-8"))) for run in runs]
    if how == "yoked":
        return scales[0]
    mean = sum(map(sum, scales)) / sum(map(len, scales))
    return [mean] * len(scales[0])


def _hardware(device: Any) -> str:
    """What a run was on, for its result."""
    import torch

    gpu = f", a share of one {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{platform.machine()}, {os.cpu_count()} cores, one thread a run{gpu}"


def _audit(trainer: Any) -> None:
    """Measure every update on all completions too, `capo/kl/whole`: what a control that sees a sample has let through.

    It is of the step as it was left, and no part of the run: the control never sees it.
    """
    from capo_rl.trainers.measuring import Measuring

    whole = Measuring(trainer, 1.0)
    remember, clear = trainer.measuring.remember, trainer.planner.clear

    def remembered(*args: Any) -> None:
        remember(*args)
        whole.remember(*args)

    def cleared() -> float:
        if whole.forwards and trainer.planner.micro_batches:
            everything = [forward.sample for forward in whole.forwards]
            kl = trainer.planner.measured_kl(
                whole.hidden_now, trainer.backbone.head(trainer.model_wrapped), everything
            ).kl
            trainer.record_figures({"capo/kl/whole": float(kl.double().mean())})
        whole.clear()
        return clear()

    trainer.measuring.remember, trainer.planner.clear = remembered, cleared


def _timed(trainer: Any, method: str) -> list[float]:
    """The seconds of each call of a trainer's method, from now on."""
    seconds: list[float] = []
    inner = getattr(trainer, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = inner(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    setattr(trainer, method, timed)
    return seconds


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """Every result under a bench's results folder, by arm and seed.

    Raises `BenchError` if there is none.
    """
    files = sorted(Path(folder).glob("*/*.json"))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    results = [result for result in found if "curves" in result]
    if not results:
        raise BenchError(f"{folder}: no results; run `capo bench` first, or give a folder like results/main")
    return results


def _short(value: float | None) -> float | None:
    """Four significant digits: what a figure can show."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")
