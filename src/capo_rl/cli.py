"""The command `capo`. Nothing heavy is imported before a command is known, so `capo --help` answers at once."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from capo_rl import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(
        prog="capo",
        description="Curvature-Aware Policy Optimization: RL post-training that leaves out the tokens that would break "
        "the run.",
    )
    parser.add_argument("--version", action="version", version=f"capo-rl {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a model by a recipe, or go on with a run that was stopped",
        description="Train a model by a recipe. A run that was stopped goes on from its last checkpoint. Any field of "
        "the recipe can be given again on the command line; `capo train RECIPE --help` lists all.",
        usage="capo train RECIPE [--FIELD VALUE ...]",
    )
    train.add_argument("recipe", metavar="RECIPE", help="a YAML file, as in recipes/")
    train.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--FIELD VALUE", help="override the recipe")
    train.set_defaults(run=_train)

    bench = commands.add_parser(
        "bench",
        help="run a grid of experiments",
        description="Run what is missing of a grid of runs, each on one core.",
    )
    bench.add_argument("name", metavar="NAME", help="a YAML file, or the name of one in experiments/")
    bench.add_argument("--seeds", type=int, help="only the first so many of its seeds")
    bench.add_argument("--only", nargs="+", default=[], metavar="ARM", help="only these arms")
    bench.add_argument("--quick", action="store_true", help="one seed and 20 steps of each arm, to see that it runs")
    bench.add_argument("--workers", type=int, help="runs at a time (default: the number of cores)")
    bench.add_argument("--results", default="results", metavar="FOLDER", help="(default: %(default)s)")
    bench.set_defaults(run=_bench)

    plot = commands.add_parser("plot", help="draw the curves of one run, or of several in one picture")
    plot.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, or NAME=FOLDER for the legend")
    plot.add_argument("--out", metavar="FILE", default="curves.png", help="the picture to write (default: %(default)s)")
    plot.add_argument("--title", default="", help="the picture's title")
    plot.set_defaults(run=_plot)

    report = commands.add_parser("report", help="one HTML page about a run, or about the results of a bench")
    report.add_argument("folder", metavar="FOLDER", help="the folder of a run, or of a bench's results")
    report.add_argument("--out", metavar="FILE", default="report.html", help="the page to write (default: %(default)s)")
    report.set_defaults(run=_report)

    options = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        run(options)
    except _mendable() as error:
        print(f"capo: error: {error}", file=sys.stderr)
        return 2
    return 0


def _train(options: argparse.Namespace) -> None:
    # What libraries say to one another about their next versions is not for someone who watches a run.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\.")

    from capo_rl.recipe import read_recipe

    recipe = read_recipe(options.recipe, options.overrides)

    from capo_rl.train import train

    summary = train(recipe)
    if summary:
        _show(summary, recipe.training.output_dir)


def _bench(options: argparse.Namespace) -> None:
    from pathlib import Path

    from capo_rl.bench import quick, read_bench, run_bench

    path = Path(options.name) if options.name.endswith(".yaml") else Path("experiments", f"{options.name}.yaml")
    bench = read_bench(path)
    if options.quick:
        bench = quick(bench)
    run_bench(bench, Path(options.results), seeds=options.seeds, only=options.only, workers=options.workers)
    print(Path(options.results, bench.name))


def _plot(options: argparse.Namespace) -> None:
    from pathlib import Path

    from capo_rl.plots import draw_comparison, draw_run
    from capo_rl.records import read_metrics

    named = [run.partition("=")[::2] if "=" in run else (Path(run).name, run) for run in options.runs]
    runs = {name: read_metrics(folder) for name, folder in named}
    if len(runs) == 1:
        ((name, entries),) = runs.items()
        draw_run(entries, Path(options.out), options.title or name)
    else:
        draw_comparison(runs, Path(options.out), options.title)
    print(options.out)


def _report(options: argparse.Namespace) -> None:
    from pathlib import Path

    from capo_rl.report import write_report

    if not (Path(options.folder) / "run.json").exists():
        from capo_rl.figures import draw_results

        draw_results(options.folder)
    print(write_report(options.folder, options.out))


def _show(summary: dict[str, Any], folder: str) -> None:
    from rich.console import Console
    from rich.table import Table

    def percent(*names: str) -> str:
        return " | ".join(f"{summary[name]:.1%}" if name in summary else "–" for name in names)

    def small(*names: str) -> str:
        return " | ".join(f"{summary[name]:.1e}" if name in summary else "–" for name in names)

    rows = [
        ("reward, first tenth → last tenth", f"{summary['reward_first']:.3f} → {summary['reward_last']:.3f}"),
        ("completions", f"{summary.get('completions', 0):,.0f}"),
        ("tokens rejected", percent("rejection_rate")),
        (
            "  of those with A > 0 | A < 0",
            percent("rejection_rate_positive", "rejection_rate_negative"),
        ),
        (
            "KL of an update, mean | max",
            small("kl_measured_mean", "kl_measured_max"),
        ),
        ("time", f"{summary.get('seconds', 0):.0f} s"),
        ("  of it curvature", f"{summary.get('seconds_curvature', 0) / max(summary.get('seconds', 0), 1e-9):.1%}"),
    ]
    table = Table(title=folder, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _mendable() -> tuple[type[Exception], ...]:
    """The errors whose message is all a user needs; of modules that were never imported there are none."""
    names = {
        "capo_rl.recipe": "RecipeError",
        "capo_rl.data": "DataError",
        "capo_rl.models": "ModelError",
        "capo_rl.records": "RunFolderError",
        "capo_rl.bench": "BenchError",
        "capo_rl.report": "ReportError",
    }
    return tuple(getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules)


if __name__ == "__main__":
    sys.exit(main())
