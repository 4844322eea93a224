"""Measure what curvature costs: the paper's materialised way beside the plain and the fused form, in one run.

    python benchmarks/curvature.py [--out results/curvature] [--threads 1] [--repeats 5]

Writes cpu.json, or cuda.json where there is a GPU, with versions and hardware. docs/performance.md reads it. Seconds
are medians. On a CPU they are processor seconds, all threads together, because other processes may run beside.

The moments are those of rows drawn by Zipf's law, as tokens are; the actual values do not change the cost.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capo_rl import AdamStep
from capo_rl.curvature.kernels import uses_triton
from capo_rl.curvature.last_layer import LastLayer, last_layer, row_gradient, support_rows, tile_elements
from capo_rl.curvature.shifts import Shifts, shifts_along, subset_direction, token_direction, token_shifts_of
from capo_rl.runs.records import versions, write_json

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
K = 50  # and the sampled token


@dataclass(frozen=True)
class Shape:
    """`tokens` are measured; `projected` of them where the output head itself is part of it."""

    d: int
    vocabulary: int
    tokens: int
    projected: int


# The paper has 24 sequences of 1,024 tokens; on a CPU one of them is measured. A GPU takes all.
SHAPES = {
    "the paper's": Shape(896, 151_936, 1024, 32),
    "Qwen2.5-Math-7B": Shape(3584, 152_064, 256, 16),
    "SmolLM2-135M": Shape(576, 49_152, 1024, 64),
}
if DEVICE.type == "cuda":
    SHAPES = {name: Shape(shape.d, shape.vocabulary, 24 * 1024, 4096) for name, shape in SHAPES.items()}


def zipf_layer(tokens: int, k: int, d: int, vocabulary: int, seed: int = 0) -> tuple[LastLayer, Tensor]:
    """The last layer at tokens whose supports are drawn by Zipf's law, without logits, and advantages."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    there: Any = {"generator": generator, "device": DEVICE}
    rows = torch.arange(min(vocabulary, 20_000), device=DEVICE)
    # the k largest of log-weights with Gumbel noise are a draw without replacement; a part of the tokens at a time
    weights = -(rows + 2.7).log()
    support = torch.cat(
        [
            (weights - torch.empty(n, len(rows), device=DEVICE).exponential_(generator=generator).log()).topk(k).indices
            for n in (min(64, tokens - first) for first in range(0, tokens, 64))
        ]
    )
    pi = torch.softmax(2 * torch.randn(tokens, k, **there), -1) * 0.98
    u = -pi.clone()
    u[:, 0] += 1
    hidden = torch.randn(tokens, d, **there)
    missing = torch.full((tokens,), 0.02, device=DEVICE)
    layer = LastLayer(hidden, support, pi, u, missing, pi[:, 0].log(), 1.0)
    return layer, torch.randn(tokens, **there)


@dataclass(frozen=True)
class Case:
    """Tokens, the weights they have in the loss, and a step model after two updates: what every form is measured on."""

    layer: LastLayer
    advantages: Tensor
    weights: Tensor
    step: AdamStep

    @property
    def slots(self) -> Tensor:
        """Where the moments of the support's rows are stored."""
        return self.step.slots(self.layer.support)

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """P and Q as they are stored."""
        return self.step.storage(self.layer.hidden.shape[1], self.layer.u)

    def plain(self) -> Shifts:
        """The shifts by the plain form, also where Triton would be used."""
        return shifts_along(token_direction(self.layer, self.advantages, self.step), self.layer, self.advantages)

    def bytes(self) -> dict[str, int]:
        """What no form can avoid to move: the tokens' inputs, and every row of P and Q that one of them supports, once.

        And what a form moves that gathers the rows for every token, where no cache helps.
        """
        layer, p = self.layer, self.moments[0]
        row = 2 * p.shape[1] * p.element_size()
        once = layer.hidden.nbytes + 4 * layer.u.nbytes + layer.support.unique().numel() * row
        return {"each row once": once, "a gather for every token": layer.support.numel() * row}


def make_case(tokens: int, d: int, vocabulary: int) -> Case:
    """The step model's moments are those of the tokens' own rows."""
    layer, advantages = zipf_layer(tokens, min(K + 1, vocabulary), d, vocabulary)
    step, weights = AdamStep(1e-5), advantages / tokens
    for _ in range(2):
        step.update(row_gradient(layer, weights))
    return Case(layer, advantages, weights, step)


class Materialised:
    """The paper's way (Section 4.1, Appendix H), in straightforward torch: [tokens, K, d] tensors and dicts of rows."""

    def __init__(self, d: int, lr: float = 1e-5, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        self.lr, self.beta1, self.beta2, self.eps, self.steps = lr, beta1, beta2, eps, 0
        self.p: dict[int, Tensor] = {}
        self.q: dict[int, Tensor] = {}
        self.zeros = torch.zeros(d, device=DEVICE)

    def shifts(self, layer: LastLayer, advantages: Tensor) -> Shifts:
        g = advantages[:, None, None] * layer.u[:, :, None] * layer.hidden[:, None, :]
        rows = layer.support.flatten().tolist()
        p = torch.stack([self.p.get(row, self.zeros) for row in rows]).view_as(g)
        q = torch.stack([self.q.get(row, self.zeros) for row in rows]).view_as(g)
        return self._shifts(g, p, q, layer, advantages)

    def shifts_of_stored(self, layer: LastLayer, advantages: Tensor, p: Tensor, q: Tensor, slots: Tensor) -> Shifts:
        """The same with the moments in two tensors instead of dicts."""
        g = advantages[:, None, None] * layer.u[:, :, None] * layer.hidden[:, None, :]
        return self._shifts(g, p[slots], q[slots], layer, advantages)

    def _shifts(self, g: Tensor, p: Tensor, q: Tensor, layer: LastLayer, advantages: Tensor) -> Shifts:
        p = (self.beta1 * p + (1 - self.beta1) * g) / (1 - self.beta1 ** (self.steps + 1))
        q = (self.beta2 * q + (1 - self.beta2) * g**2) / (1 - self.beta2 ** (self.steps + 1))
        step = self.lr * p / (q.sqrt() + self.eps)
        return shifts_along(torch.einsum("nkd,nd->nk", step, layer.hidden), layer, advantages)

    def update(self, layer: LastLayer, weights: Tensor) -> None:
        g = weights[:, None, None] * layer.u[:, :, None] * layer.hidden[:, None, :]
        rows, inverse = layer.support.unique(return_inverse=True)
        total = g.new_zeros(len(rows), g.shape[2]).index_add_(0, inverse.flatten(), g.flatten(0, 1))
        gradients = dict(zip(rows.tolist(), total, strict=True))
        for row in self.p.keys() | gradients.keys():
            gradient = gradients.get(row, self.zeros)
            self.p[row] = self.beta1 * self.p.get(row, self.zeros) + (1 - self.beta1) * gradient
            self.q[row] = self.beta2 * self.q.get(row, self.zeros) + (1 - self.beta2) * gradient**2
        self.steps += 1

    @staticmethod
    def of(case: Case) -> Materialised:
        """After the same two updates as the case's step model."""
        paper = Materialised(case.layer.hidden.shape[1])
        for _ in range(2):
            paper.update(case.layer, case.weights)
        return paper


# --- clocks


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median time of `work` after one run that isn't counted: on a GPU between two events, from a cold cache."""
    work()
    timed = _between_events if DEVICE.type == "cuda" else by_the_clock
    return statistics.median(timed(work) for _ in range(repeats))


def by_the_clock(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _between_events(work: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(2**28, dtype=torch.uint8, device=DEVICE).zero_()  # what the last run left in the cache goes
    torch.cuda.synchronize()
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def extra_bytes(work: Callable[[], object]) -> int:
    """How far memory rises above where it was while `work` runs."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is in use
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of the fastest of several copies of a tensor that no cache holds."""
    source = torch.rand(2**28 if DEVICE.type == "cuda" else 2**26, device=DEVICE)  # zeros can be faster than numbers
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), 1) for _ in range(5))


def root_and_quotient() -> float:
    """Seconds that torch takes for one square root and one quotient, in a tile that stays in the cache."""
    tile = torch.rand(tile_elements(DEVICE) // 2, device=DEVICE)
    other, room = torch.rand_like(tile), torch.empty_like(tile)

    def work() -> None:
        for _ in range(20):
            torch.sqrt(tile, out=room).div_(other)

    return seconds(work, 5) / (20 * tile.numel())


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


# --- measurements


def exact(layer: LastLayer, advantages: Tensor, step: AdamStep) -> tuple[Tensor, Tensor]:
    """s and c in float64 by one formula after another."""
    h, u, pi, missing = (x.double() for x in (layer.hidden, layer.u, layer.pi, layer.missing_mass))
    g = advantages.double()[:, None, None] * u[:, :, None] * h[:, None, :]
    p, q = (moment.double().view_as(g) for moment in step.moments(layer.support.flatten()))
    (beta1, beta2), t = step.betas, step.steps + 1
    p = (beta1 * p + (1 - beta1) * g) / (1 - beta1**t)
    q = (beta2 * q + (1 - beta2) * g**2) / (1 - beta2**t)
    v = (step.lr * p / (q.sqrt() + step.eps) * h[:, None, :]).sum(-1)
    mean = (pi * v).sum(-1)
    return (u * v).sum(-1), (pi * (v - mean[:, None]) ** 2).sum(-1) + missing * mean**2


def token_level(shape: Shape, repeats: int, bandwidth: float, arithmetic: float) -> dict[str, Any]:
    """Shifts of every token and the moments' update, by each form."""
    case = make_case(shape.tokens, shape.d, shape.vocabulary)
    layer, advantages, weights, step = case.layer, case.advantages, case.weights, case.step
    paper, slots, (p, q) = Materialised.of(case), case.slots, case.moments
    forms: dict[str, Callable[[], Shifts]] = {
        "materialised, moments in dicts": lambda: paper.shifts(layer, advantages),
        "materialised, moments in tensors": lambda: paper.shifts_of_stored(layer, advantages, p, q, slots),
        "plain": case.plain,
    }
    if uses_triton(layer.hidden):
        forms["fused"] = lambda: token_shifts_of(layer, advantages, step)
    some = torch.arange(0, shape.tokens, max(1, shape.tokens // 32), device=DEVICE)
    exact_s, exact_c = exact(layer[some], advantages[some], step)
    moved = case.bytes()
    found: dict[str, Any] = {
        "tokens": shape.tokens,
        "d": shape.d,
        "rows_with_moments": len(step.rows),
        "bytes": moved,
        "floor_seconds": {
            **{f"bytes, {what}": size / bandwidth for what, size in moved.items()},
            "square roots and quotients alone": slots.numel() * shape.d * arithmetic,
        },
        "shifts": {},
        "update": {},
    }
    for name, form in forms.items():
        shifts = form()
        found["shifts"][name] = {
            "seconds": seconds(form, repeats),
            "extra_bytes": extra_bytes(form),
            "largest_error_of_s": float(((shifts.s[some] - exact_s).abs() / exact_s.abs().max()).max()),
            "largest_error_of_c": float(((shifts.c[some] - exact_c).abs() / exact_c.abs().max()).max()),
        }
    updates: dict[str, Callable[[], None]] = {
        "materialised, moments in dicts": lambda: paper.update(layer, weights),
        "fused" if uses_triton(layer.hidden) else "plain": lambda: step.update(row_gradient(layer, weights)),
    }
    for name, update in updates.items():
        found["update"][name] = {"seconds": seconds(update, repeats), "extra_bytes": extra_bytes(update)}
    rows = support_rows(layer)
    found["one batch-level direction"] = {
        "seconds": seconds(lambda: subset_direction(layer, weights, step, rows), repeats)
    }
    three = torch.stack([weights, weights.roll(1), weights.roll(2)])
    found["three batch-level directions in one pass"] = {
        "seconds": seconds(lambda: subset_direction(layer, three, step, rows), repeats)
    }
    found["sorting the support"] = {"seconds": seconds(lambda: support_rows(layer), repeats)}
    return found


def vocabulary_level(shape: Shape, repeats: int) -> dict[str, float]:
    """Seconds a token of what reads the whole vocabulary: the projection, and the support out of its logits."""
    n, generator = shape.projected, torch.Generator().manual_seed(0)
    block = torch.randn(1024, shape.d, generator=generator).to(DEVICE)
    weight = block.repeat(math.ceil(shape.vocabulary / 1024), 1)[: shape.vocabulary]
    hidden = torch.randn(n, shape.d, generator=generator).to(DEVICE)
    logits = 3 * torch.randn(n, shape.vocabulary, generator=generator).to(DEVICE)
    actions = torch.zeros(n, dtype=torch.long, device=DEVICE)
    layer = last_layer(hidden, logits, actions, top_k=K)
    assert torch.equal(largest_by_tiles(logits, K).sort().values, logits.topk(K).values.sort().values)
    works: dict[str, Callable[[], object]] = {
        "projection W h": lambda: hidden @ weight.T,
        "last_layer: support and π": lambda: last_layer(hidden, logits, actions, top_k=K),
        "of it, exact top k": lambda: logits.topk(K, sorted=False),
        "of it, logsumexp": lambda: logits.logsumexp(-1),
        "exact top k in two stages": lambda: largest_by_tiles(logits, K),
        "support by a threshold": lambda: (logits > layer.log_pi_a[:, None]).sum(-1),
    }
    return {name: seconds(work, repeats) / n for name, work in works.items()}


def largest_by_tiles(logits: Tensor, k: int, tile: int = 64) -> Tensor:
    """The k largest logits [n, k]: they lie in the k tiles with the largest maxima."""
    whole = logits.shape[1] // tile * tile
    tiled = logits[:, :whole].view(len(logits), -1, tile)
    best = tiled.amax(-1).topk(min(k, tiled.shape[1]), sorted=False).indices
    candidates = tiled.gather(1, best[:, :, None].expand(-1, -1, tile)).flatten(1)
    return torch.cat([candidates, logits[:, whole:]], 1).topk(k, sorted=False).values


def exponents(repeats: int) -> dict[str, Any]:
    """How the cost grows with each size: the slope of log seconds over log size, fitted to four sizes."""
    base = {"N": 256, "k": 32, "d": 256, "V": 8192}
    found: dict[str, Any] = {"base": base}
    for name in base:
        sizes, times = [], []
        for doubling in range(4):
            size = base | {name: base[name] * 2**doubling}
            if name == "V":
                generator = torch.Generator().manual_seed(0)
                logits = torch.randn(64, size["V"], generator=generator).to(DEVICE)
                arguments = (
                    torch.zeros(64, 1, device=DEVICE),
                    logits,
                    torch.zeros(64, dtype=torch.long, device=DEVICE),
                )
                work: Callable[[], object] = lambda a=arguments: last_layer(*a, top_k=K)  # noqa: E731
            else:
                layer, advantages = zipf_layer(size["N"], size["k"], size["d"], 4096)
                step = AdamStep(1e-5)
                step.update(row_gradient(layer, advantages))
                work = lambda a=(layer, advantages, step): token_shifts_of(*a)  # noqa: E731
            sizes.append(size[name])
            times.append(seconds(work, repeats))
        found[name] = {"sizes": sizes, "seconds": times, "exponent": _slope(sizes, times)}
    return found


def moments_in_bfloat16(updates: int = 100, quantile: float = 0.9) -> dict[str, Any]:
    """What moments in bfloat16 change: m_F, and verdicts under a bound that accepts `quantile` of the tokens."""
    steps = {"float32": AdamStep(1e-5), "bfloat16": AdamStep(1e-5, moment_dtype=torch.bfloat16)}
    for seed in range(updates):
        layer, advantages = zipf_layer(64, K, 128, 4096, seed)
        for step in steps.values():
            step.update(row_gradient(layer, advantages / len(layer)))
    layer, advantages = zipf_layer(2048, K, 128, 4096, seed=updates)
    m_f = {name: token_shifts_of(layer, advantages, step).m_f for name, step in steps.items()}
    bound = m_f["float32"].quantile(quantile)
    flips = (m_f["float32"] < bound) != (m_f["bfloat16"] < bound)
    memory = {name: sum(x.nbytes for x in step.storage(128, layer.u)) for name, step in steps.items()}
    change = (m_f["bfloat16"] / m_f["float32"] - 1).abs()
    return {
        "updates": updates,
        "tokens": len(layer),
        "median_relative_change_of_m_f": float(change.median()),
        "p99_relative_change_of_m_f": float(change.quantile(0.99)),
        "verdicts_that_flip": float(flips.float().mean()),
        "bytes_of_the_moments": memory,
    }


def _slope(sizes: list[int], times: list[float]) -> float:
    x, y = [math.log(size) for size in sizes], [math.log(t) for t in times]
    return statistics.linear_regression(x, y).slope


def hardware() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        processor = next(
            (x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x), processor
        )
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/curvature"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    bandwidth, arithmetic = copy_bandwidth(), root_and_quotient()
    result = {
        "versions": versions(),
        "hardware": hardware(),
        "threads": args.threads,
        "repeats": args.repeats,
        "load_average": {"before": load},
        "clock": "events" if DEVICE.type == "cuda" else "processor time",
        "tile_elements": tile_elements(DEVICE),
        "copy_bandwidth_bytes_per_second": bandwidth,
        "token_level": {},
        "vocabulary_level_seconds_per_token": {},
    }
    with torch.no_grad():
        for name, shape in SHAPES.items():
            result["token_level"][name] = found = token_level(shape, args.repeats, bandwidth, arithmetic)
            plain = found["shifts"]["plain"]
            print(
                f"\n{name}: {found['tokens']} tokens, d = {found['d']}, {found['rows_with_moments']} rows with moments"
            )
            for form, row in found["shifts"].items():
                print(
                    f"  {form:34}{1e3 * row['seconds']:10.1f} ms {row['seconds'] / plain['seconds']:7.1f} x plain"
                    f"{row['extra_bytes'] / 2**20:10.1f} MiB   error of s {row['largest_error_of_s']:.0e}"
                )
            for form, row in found["update"].items():
                print(f"  update, {form:26}{1e3 * row['seconds']:10.1f} ms{row['extra_bytes'] / 2**20:28.1f} MiB")
            for what in (
                "one batch-level direction",
                "three batch-level directions in one pass",
                "sorting the support",
            ):
                print(f"  {what:42}{1e3 * found[what]['seconds']:10.1f} ms")
            for what, floor in found["floor_seconds"].items():
                print(f"  {what:34}{1e3 * floor:10.1f} ms")
            result["vocabulary_level_seconds_per_token"][name] = vocabulary = vocabulary_level(shape, args.repeats)
            for what, cost in vocabulary.items():
                print(f"  {what:34}{1e6 * cost:10.1f} µs a token")
        result["exponents"] = exponents(args.repeats)
        result["moments_in_bfloat16"] = moments_in_bfloat16()
    print(
        "\nexponents:", {name: round(fit["exponent"], 2) for name, fit in result["exponents"].items() if name != "base"}
    )
    print("moments in bfloat16:", result["moments_in_bfloat16"])
    result["load_average"]["after"] = os.getloadavg()[0]
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"{DEVICE.type}.json", result)


if __name__ == "__main__":
    main()
