"""The commands of evaluation: `capo eval` and `capo regrade`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from capo_rl.cli.options import Commands


def add_evaluate(commands: Commands) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="measure a model's accuracy on the paper's eight benchmarks, or go on with an evaluation that was stopped",
        description="Complete the problems of benchmarks, grade them, and show accuracies with 95 % intervals. An "
        "evaluation that was stopped goes on where it was: run the same command again. Of GPQA, as its authors ask, no "
        "text is kept: only letters and verdicts.",
    )
    evaluate.add_argument(
        "model",
        metavar="MODEL",
        help="a folder (a LoRA adapter's too), a .gguf file, package:NAME, embedded, or a hub id",
    )
    evaluate.add_argument(
        "--benchmarks", nargs="+", default=["all"], metavar="NAME", help="which of the eight (default: all)"
    )
    evaluate.add_argument("--data", metavar="FOLDER", help="where NAME.jsonl files are (default: from the hub)")
    evaluate.add_argument("--samples", type=int, help="completions a problem (default: the benchmark's)")
    evaluate.add_argument("--temperature", type=float, help="of sampling, 0 is greedy (default: the benchmark's)")
    evaluate.add_argument("--top-p", type=float, help="nucleus sampling, 1 is none (default: the benchmark's)")
    evaluate.add_argument(
        "--max-new-tokens", type=int, default=1024, help="a longer completion is truncated (default: %(default)s)"
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="N problems of each benchmark, always the same ones")
    evaluate.add_argument(
        "--batch-size", type=int, help="completions at a time (default: 32, or 1024 by vLLM, which batches by itself)"
    )
    evaluate.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    evaluate.add_argument("--out", metavar="FOLDER", help="where it is kept (default: runs/eval-MODEL)")
    evaluate.add_argument("--baseline", metavar="FOLDER", help="another evaluation, to show the differences from it")
    evaluate.set_defaults(run=_eval)


def _eval(options: argparse.Namespace) -> None:
    import re
    from pathlib import Path

    from capo_rl.evaluation.benchmarks import BENCHMARKS
    from capo_rl.evaluation.evaluate import Settings, evaluate
    from capo_rl.evaluation.folder import read_evaluation, read_settings
    from capo_rl.evaluation.summary import compare, summarize

    names = list(BENCHMARKS) if "all" in options.benchmarks else options.benchmarks
    settings = Settings(
        options.model,
        samples=options.samples,
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        limit=options.limit,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    short = re.sub(r"[^\w.-]+", "-", re.split(r"[/:\\]", options.model.rstrip("/\\"))[-1])
    folder = Path(options.out or f"runs/eval-{short}")
    baseline = read_evaluation(options.baseline) if options.baseline else None  # before hours of work, not after
    evaluation = evaluate(settings, names, folder, data=options.data)
    _show_evaluation(summarize(evaluation), folder)
    if baseline is not None:
        ours, theirs = read_settings(folder), read_settings(options.baseline)
        other = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        alone = {
            name: len(evaluation.get(name) or baseline[name])
            for name in BENCHMARKS
            if (name in evaluation) != (name in baseline)
        }
        _show_differences(compare(evaluation, baseline), options.baseline, other, alone)


def add_regrade(commands: Commands) -> None:
    regrade = commands.add_parser(
        "regrade",
        help="grade an evaluation's completions again",
        description="Grade the completions of an evaluation again, from disk, and say how many verdicts changed.",
    )
    regrade.add_argument("folder", metavar="FOLDER", help="the folder of an evaluation")
    regrade.set_defaults(run=_regrade)


def _regrade(options: argparse.Namespace) -> None:
    from capo_rl.evaluation.folder import read_evaluation
    from capo_rl.evaluation.regrade import regrade
    from capo_rl.evaluation.summary import summarize

    done = regrade(options.folder)
    _show_evaluation(summarize(read_evaluation(options.folder)), options.folder)
    print(
        f"{done.changed:,} of {done.completions:,} verdicts changed ({done.now_right:,} to right, "
        f"{done.no_longer_right:,} from right)"
    )
    said = {True: "right", False: "wrong", None: "no verdict"}
    for change in done.changes:
        before, after = (f"{said[correct]} ({reason})" for correct, reason in (change.before, change.after))
        # As Python writes them: an answer may hold what a terminal obeys.
        print(f"{change.problem}: {change.answer!a} for {change.gold!a}: {before}, now {after}")
    for name in done.secret:
        print(f"{name}: not graded again: its completions are not kept, as its authors ask")


def _show_evaluation(summary: dict[str, Any], folder: Any) -> None:
    rows = {
        name: (
            f"{row['problems']:,}",
            f"{row['accuracy']:.1%}",
            _interval(row["low"], row["high"]),
            f"{row['pass@k'][str(row['samples'])]:.1%} @{row['samples']}",
            f"{row['tokens']:,.0f}",
            f"{row['truncated']:,}",
            f"{row['timed_out']:,}",
        )
        for name, row in summary["benchmarks"].items()
    }
    mean = summary["mean"]
    name = "TEST" if mean["test"] else "mean of those run"
    last = {name: ("", f"{mean['accuracy']:.1%}", _interval(mean["low"], mean["high"]))}
    headings = ("problems", "accuracy", "95 %\ninterval", "pass@k", "tokens", "truncated", "timed\nout")
    _show_table(str(folder), headings, rows, last)


def _show_differences(
    differences: Sequence[Any], baseline: str, other: Sequence[str], alone: Mapping[str, int]
) -> None:
    rows = {
        row.name: (
            f"{row.problems:,}",
            f"{row.difference:+.1%}",
            _interval(row.low, row.high, "+"),
            f"{row.above:.3f}",
            f"{row.apart:,}",
        )
        for row in differences
    }
    last = {"mean": rows.pop("mean")} if "mean" in rows else {}
    headings = ("problems", "difference", "95 %\ninterval", "P(above 0)", "problems\nin one only")
    _show_table(f"less {baseline}", headings, rows, last)
    for name, problems in alone.items():
        print(f"{name}: {problems:,} problems, in one of the two only")
    if other:
        print(f"The two differ in: {', '.join(other)}")


def _show_table(
    title: str, headings: Sequence[str], rows: Mapping[str, Sequence[str]], last: Mapping[str, Sequence[str]]
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Narrow enough for 80 columns.
    table = Table("", title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, cells in rows.items():
        table.add_row(name, *cells)
    table.add_section()
    for name, cells in last.items():
        table.add_row(name, *cells)
    Console().print(table)


def _interval(low: float, high: float, sign: str = "") -> str:
    return "–" if low != low else f"{100 * low:{sign}.1f}…{100 * high:{sign}.1f}"
