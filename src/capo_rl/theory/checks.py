"""Each statement of the paper tried on random MDPs, policies and steps, and the counterexamples to those that fail.

    python -m capo_rl.theory.checks

prints the tables of docs/theory.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from capo_rl.runs.records import write_json
from capo_rl.theory.counterexamples import counterexamples, horizons, orders
from capo_rl.theory.guarantee import (
    Row,
    Setting,
    constant,
    random_mdps,
    random_steps,
)
from capo_rl.theory.statements import (
    Check,
    check_aggregation,
    check_derivatives,
    check_expansions,
    check_gaps,
    check_theorem,
    merge,
    search_gap,
)


def tables(cases: int, settings: Sequence[Setting]) -> dict[str, list[Row]]:
    """Every check on `cases` MDPs of each setting, with fixed seeds."""
    checks, theorem, errors = list[Check](), list[Row](), list[dict[str, float]]()
    for seed, setting in enumerate(settings):
        mdp, theta = random_mdps(cases, seed, setting)
        for try_on in (check_expansions, check_derivatives, check_gaps):
            checks += try_on(mdp, theta, random_steps(theta, 100 + seed))
        for subsets in (1, 2, 3, 8):
            checks += check_aggregation(mdp, theta, subsets, seed)
        if constant(setting) > 0:
            for power in (None, 0.5, 1.0):
                checks += search_gap(*random_mdps(64, 200 + seed, setting), seed, power)
        theorem += [check_theorem(mdp, theta, norm, seed) for norm in (0.1, 30.0)]
        errors.append(orders(mdp, theta, random_steps(theta, 300 + seed, -2, -2)))
    by_error: list[Row] = [
        {"error": name, **{str(x): row[name] for x, row in zip(settings, errors, strict=True)}} for name in errors[0]
    ]
    statements: list[Row] = [asdict(x) for x in merge(checks)]
    return {"Statements": statements, "Order of the error in ‖Δθ‖": by_error, "Theorem 5.1": theorem,
            "Counterexamples": counterexamples(), "Horizons": horizons()}  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """A table, floats to three digits, NaN and None as nothing."""

    def cell(x: object) -> str:
        if x is None or (isinstance(x, float) and math.isnan(x)):
            return ""
        return f"{x:.3g}" if isinstance(x, float) else str(x).replace("|", "\\|")

    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m capo_rl.theory.checks", description="Try the paper's statements.")
    parser.add_argument("--cases", type=int, default=1000, help="MDPs of each of the ten settings (default: 1000)")
    parser.add_argument("--json", type=Path, help="write the tables to this file too")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the same sums in the same order everywhere
    settings = [*map(Setting, (0.0, 0.2, 0.5, 0.9, 0.99)), *(Setting(horizon=T) for T in (1, 2, 3, 5, 10))]
    found = tables(args.cases, settings)
    print("\n\n".join(f"## {title}\n\n{markdown(rows)}" for title, rows in found.items()))
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
