"""What CAPO adds to a step by formula, held against what is measured, and carried on to sizes that don't fit here.

    python benchmarks/scaling.py            # results/scaling.json; five minutes on two cores
    python benchmarks/scaling.py --bytes    # counts bytes alone, and leaves the seconds that were measured

Of n tokens a process, k rows a token, d, V and 1, 2, 4 or 8 processes (gloo): bytes handed over and bytes held, which
are counted, and seconds, whose constants are fitted to a base and its doublings, one and two at a time, and then
predict points that are twice and four times as large in all four. Tokens are made up: a vocabulary row is as likely as
one over its number.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from capo_rl.curvature.head import Head
from capo_rl.curvature.last_layer import blocks, tile_rows
from capo_rl.curvature.processes import Processes
from capo_rl.curvature.selection import Thresholds
from capo_rl.curvature.step import AdamStep
from capo_rl.planning.planner import Planner
from capo_rl.planning.updates import Updates
from capo_rl.runs.records import versions, write_json

_FLOAT, _INT = 4, 8
_SAMPLE = 0.25  # `capo_kl_sample`: the share of the completions that the default looks at


@dataclass(frozen=True)
class Size:
    """A step: tokens a process, rows of a support, width, vocabulary, processes."""

    n: int
    k: int
    d: int
    vocabulary: int
    processes: int = 1


# ---- the formulas ----------------------------------------------------------------------------------------------------


def held_by_a_plan(size: Size, of_hidden: int = _FLOAT) -> int:
    """Bytes between plan and commit: h; row, π and u of k + 1 entries; missing mass, log π(a), four shifts, advantage,
    advantage used, weight and verdict."""
    return size.n * (size.d * of_hidden + (size.k + 1) * (_INT + 2 * _FLOAT) + 9 * _FLOAT + 1)


def held_by_a_look(size: Size, of_hidden: int = _FLOAT, sample: float = _SAMPLE) -> int:
    """The same of the default: the last layer alone at the sampled tokens, and which they are."""
    token = size.d * of_hidden + (size.k + 1) * (_INT + 2 * _FLOAT) + 2 * _FLOAT
    return round(sample * size.n) * token + size.n


def held_by_moments(rows: int, size: Size) -> int:
    """P and Q of the rows that any token touched, and of the row of zeros."""
    return 2 * (rows + 1) * size.d * _FLOAT


def held_by_spread_moments(rows: int, size: Size) -> int:
    """The same of a process that keeps its part, the first and so the largest."""
    return held_by_moments(math.ceil(rows / size.processes), size)


def fetched(rows: int, size: Size, tile: int) -> int:
    """Bytes that a process hands in where P and Q of so many rows are fetched, which lie in the processes in turn: its
    part of each `tile` of rows, and how large that is."""
    tiles = [len(range(rows)[some]) for some in blocks(rows, tile)]
    return sum(size.processes * _INT + 2 * math.ceil(each / size.processes) * size.d * _FLOAT for each in tiles)


def handed_over_for_spread_moments(rows: int, size: Size, *, logged: bool) -> int:
    """What comes to `handed_over` where moments are spread over processes, in a step of one micro-batch: which rows
    anybody asks for, and those; in a logged step once more, with each tile of the gradient."""
    both, one = (tile_rows(width * size.d, torch.device("cpu")) for width in (2, 1))
    tiles = [len(range(rows)[some]) for some in blocks(rows, one)] if logged else []
    return _INT + rows + 1 + fetched(rows, size, both) + sum(fetched(each, size, both) for each in tiles)


def handed_over(rows: int, last_row: int, size: Size, *, logged: bool) -> int:
    """Bytes that a process hands to collectives in a step that predicts: verdicts and shifts of its tokens, which rows
    anybody has, and the gradient on those; a logged step plans two batch-level steps and reduces their gradients
    too."""
    if size.processes == 1:
        return 0
    counts = size.processes * _INT
    union = _INT + last_row + 1
    figures = counts + size.n * 8 * _FLOAT
    gradient = union + rows * size.d * _FLOAT
    return figures + gradient + (union + 2 * rows * size.d * _FLOAT + 5 * _INT if logged else 0)


def handed_over_by_default(size: Size, sample: float = _SAMPLE) -> int:
    """The same of the default: what the supports leave out and the KL, of the sampled tokens, and the mean."""
    if size.processes == 1:
        return 0
    return 2 * (size.processes * _INT + round(sample * size.n) * _FLOAT) + _INT


def work(size: Size, rows: int) -> list[float]:
    """What seconds are made of: a product with W, a pass over the logits, shifts, moments."""
    return [size.n * size.vocabulary * size.d, size.n * size.vocabulary, size.n * size.k * size.d, rows * size.d]


@dataclass(frozen=True)
class Run:
    """A run that is too large for here: weights, tokens of a step, processes that share them."""

    weights: float
    d: int
    completions: int
    length: int
    processes: int
    k: int = 50
    vocabulary: int = 152_064


RUNS = {
    "7B, 96 completions of 1,024 tokens, 8 processes": Run(7.6e9, 3584, 96, 1024, 8),
    "70B, 1,024 of 4,096, 512 processes": Run(72.7e9, 8192, 1024, 4096, 512),
    "70B, 1,024 of 32,768, 512 processes": Run(72.7e9, 8192, 1024, 32_768, 512),
}
_ENOUGH = 16_384  # tokens of all processes, to measure a step's mean KL on


def carried_on(run: Run) -> dict[str, float]:
    """What a process adds at the worst, where its step touches the whole vocabulary; hidden states in two bytes.

    Operations are over those of training on the step (6 a weight and token), bytes handed over are over one gradient's
    in two bytes; generation is in neither. Weights, gradient and Adam's state take 16 bytes a weight, sharded.
    """
    tokens = run.completions * run.length
    size = Size(tokens // run.processes, run.k, run.d, run.vocabulary, run.processes)
    head, training = 2 * run.vocabulary * run.d, 6 * run.weights
    found: dict[str, float] = {
        "tokens a process": size.n,
        "sharded training, GB": 16 * run.weights / run.processes / 1e9,
    }
    for name, sample in (("default", _SAMPLE), ("default, 16,384 tokens", min(1.0, _ENOUGH / tokens))):
        found |= {
            f"{name}, sample": sample,
            f"{name}, held, GB": held_by_a_look(size, 2, sample) / 1e9,
            f"{name}, operations": sample * (2 * run.weights + 2 * head) / training,
        }
    rows = run.vocabulary
    return found | {
        "mask, held, GB": held_by_a_plan(size, 2) / 1e9,
        "mask, moments, GB": held_by_moments(rows, size) / 1e9,
        "mask, moments, spread, GB": held_by_spread_moments(rows, size) / 1e9,
        "mask, fetched for a micro-batch": 2 * rows * run.d * _FLOAT / (2 * run.weights),
        "mask, operations": head / training,
        "mask, handed over": handed_over(rows, rows - 1, size, logged=False) / (2 * run.weights),
        "head sharded, broadcast": 2 * run.vocabulary * run.d / (2 * run.weights),
    }


# ---- the measurements ------------------------------------------------------------------------------------------------


def made_up(size: Size, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a head and actions. A token's likeliest rows are drawn by Zipf's law."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size.vocabulary, size.d, generator=generator) / math.sqrt(size.d)
    generator.manual_seed(1 + rank)
    law = 1 / torch.arange(1, size.vocabulary + 1, dtype=torch.float64)
    likely = torch.multinomial(law, size.n * 4, replacement=True, generator=generator).view(size.n, 4)
    hidden = 4 * weight[likely].sum(1) + 0.1 * torch.randn(size.n, size.d, generator=generator)
    return hidden, weight, likely[:, 0]


@torch.no_grad()
def measured(size: Size, rank: int = 0) -> dict[str, Any]:
    hidden, weight, actions = made_up(size, rank)
    advantages = torch.randn(size.n, generator=torch.Generator().manual_seed(rank))
    processes = Processes()
    found: dict[str, Any] = asdict(size)
    planner = Planner(AdamStep(1e-5), Thresholds(None, None), top_k=size.k, processes=processes)
    for name in ("first", "step", "logged step"):
        start = time.process_time()
        planned = planner.plan(hidden, Head(weight), actions, advantages)
        planned.weights = advantages / (size.processes * size.n)
        found["held"] = _bytes(planned)
        planner.commit(describe=name == "logged step")
        found[f"{name}, seconds"] = time.process_time() - start
        found[f"{name}, bytes"] = processes.take_bytes()
    found["rows"], found["last row"] = len(planner.step.rows), int(planner.step.rows.max())
    state = planner.step.state_dict()
    found["moments"] = 2 * (state["p"].nbytes + size.d * _FLOAT)
    updates = Updates(top_k=size.k, processes=processes)
    sample = torch.zeros(size.n, dtype=torch.bool)
    sample[: round(_SAMPLE * size.n)] = True
    seen = updates.look(hidden[sample], Head(weight), actions[sample], sample)
    seen.weights = advantages
    found["default, held"] = _bytes(seen.layer) + seen.sample.nbytes
    updates.commit()
    updates.measured_kl(lambda i: 1.01 * hidden[sample], Head(weight))
    found["default, bytes"] = processes.take_bytes()
    return found


@torch.no_grad()
def measured_spread(size: Size, rank: int) -> dict[str, Any]:
    """What of it is otherwise where moments are spread over the processes."""
    hidden, weight, actions = made_up(size, rank)
    processes, advantages = Processes(), torch.ones(size.n)
    planner = Planner(AdamStep(1e-5, processes=processes), Thresholds(None, None), top_k=size.k)
    found = {}
    for name in ("first", "step", "logged step"):
        planner.plan(hidden, Head(weight), actions, advantages).weights = advantages
        planner.commit(describe=name == "logged step")
        found[f"spread, {name}, bytes"] = processes.take_bytes()
    found["spread, moments"] = sum(moment.nbytes for moment in planner.step.storage(size.d, weight))
    return found


def _bytes(holder: Any) -> int:
    """Of the tensors that an object holds, each counted once."""
    seen: dict[int, int] = {}

    def count(each: Any) -> None:
        if isinstance(each, torch.Tensor):
            seen[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        elif hasattr(each, "__dict__") and not isinstance(each, Processes):
            for value in vars(each).values():
                count(value)

    count(holder)
    return sum(seen.values())


def together(size: Size) -> dict[str, Any]:
    """The same with several processes; what the first says."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_one, (folder, size), nprocs=size.processes, start_method="fork")
        return json.loads(Path(folder, "found.json").read_text(encoding="utf-8"))


def _one(rank: int, folder: str, size: Size) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size.processes)
    found = measured(size, rank) | measured_spread(size, rank)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


# ---- the comparison --------------------------------------------------------------------------------------------------


def compared(found: dict[str, Any]) -> dict[str, list[float]]:
    """Predicted and measured of everything that is counted."""
    size = Size(**{name: found[name] for name in Size.__dataclass_fields__})
    rows, last = found["rows"], found["last row"]
    by_kind = {
        "held between plan and commit": [held_by_a_plan(size), found["held"]],
        "the same, default": [held_by_a_look(size), found["default, held"]],
        "moments": [held_by_moments(rows, size), found["moments"]],
        "handed over in a step": [handed_over(rows, last, size, logged=False), found["step, bytes"]],
        "in a logged step": [handed_over(rows, last, size, logged=True), found["logged step, bytes"]],
        "in a step, default": [handed_over_by_default(size), found["default, bytes"]],
    }
    if size.processes > 1:
        by_kind["moments, spread"] = [held_by_spread_moments(rows, size), found["spread, moments"]]
        for name, logged in (("step", False), ("logged step", True)):
            whole = handed_over(rows, last, size, logged=logged)
            by_kind[f"in a {name}, spread"] = [
                whole + handed_over_for_spread_moments(rows, size, logged=logged),
                found[f"spread, {name}, bytes"],
            ]
    return by_kind


def fitted(points: list[dict[str, Any]]) -> np.ndarray:
    """Seconds for a unit of each kind of work, none negative: least squares of the relative error."""
    rows = np.array([np.array(work(_size(each), each["rows"])) / each["step, seconds"] for each in points])
    kinds, best, found = rows.shape[1], math.inf, np.zeros(rows.shape[1])
    for some in itertools.chain.from_iterable(itertools.combinations(range(kinds), n) for n in range(1, kinds + 1)):
        constants = np.zeros(kinds)
        constants[list(some)] = np.linalg.lstsq(rows[:, some], np.ones(len(rows)), rcond=None)[0]
        error = float(np.square(rows @ constants - 1).sum())
        if (constants >= 0).all() and error < best:
            best, found = error, constants
    return found


def _size(found: dict[str, Any]) -> Size:
    return Size(**{name: found[name] for name in Size.__dataclass_fields__})


def _best(run: Callable[[Size], dict[str, Any]], size: Size, repeats: int) -> dict[str, Any]:
    """Of several measurements the one that other work disturbed least."""
    return min((run(size) for _ in range(repeats)), key=lambda found: found["step, seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/scaling.json"))
    parser.add_argument("--base", type=int, nargs=4, default=[512, 32, 128, 8192], metavar=("N", "K", "D", "V"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bytes", action="store_true", help="on a busy machine: keep the seconds that are in --out")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    base = Size(*asked.base)
    doubled = [replace(base, **{name: 2 * getattr(base, name)}) for name in ("n", "k", "d", "vocabulary")]
    pairs = [
        replace(base, **{name: 2 * getattr(base, name) for name in both})
        for both in itertools.combinations(("n", "k", "d", "vocabulary"), 2)
    ]
    larger = [
        replace(base, n=factor * base.n, k=factor * base.k, d=factor * base.d, vocabulary=factor * base.vocabulary)
        for factor in (2, 4)
    ]
    repeats = 1 if asked.bytes else asked.repeats
    alone = {size: _best(measured, size, repeats) for size in [base, *doubled, *pairs, *larger]}
    constants = fitted([alone[size] for size in [base, *doubled, *pairs]])
    seconds = [
        {**asdict(size), "predicted": float(np.dot(work(size, alone[size]["rows"]), constants))}
        | {"measured": alone[size]["step, seconds"], "fitted": size not in larger}
        for size in alone
    ]
    several = [together(replace(base, processes=count)) for count in (2, 4, 8)]
    counted = [_named(found) | compared(found) for found in [*alone.values(), *several]]
    timed: dict[str, Any] = {
        "seconds": seconds,
        "seconds a unit": dict(zip(("product", "pass", "shifts", "moments"), constants.tolist(), strict=True)),
    }
    if asked.bytes:
        before = json.loads(asked.out.read_text(encoding="utf-8"))
        timed = {name: before[name] for name in timed}
    result = timed | {
        "bytes": counted,
        "rows by processes": [[found["processes"], found["rows"]] for found in [alone[base], *several]],
        "carried on": {name: asdict(run) | carried_on(run) for name, run in RUNS.items()},
        "versions": versions(),
    }
    write_json(asked.out, result, indent=1)
    for row in timed["seconds"]:
        print(
            f"n {row['n']}, k {row['k']}, d {row['d']}, V {row['vocabulary']}: "
            f"{row['predicted']:.4f} s predicted, {row['measured']:.4f} measured"
        )
    off = {name: max(abs(a / b - 1) for a, b in pairs if b) for name, pairs in _by_name(counted).items()}
    print("largest error of what is counted:", off)


def _named(found: dict[str, Any]) -> dict[str, Any]:
    return asdict(_size(found)) | {"rows": found["rows"]}


def _by_name(counted: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    names = dict.fromkeys(name for row in counted for name, value in row.items() if isinstance(value, list))
    return {name: [row[name] for row in counted if name in row] for name in names}


if __name__ == "__main__":
    main()
