"""The command `capo`. Nothing heavy is imported before a command is known, so `capo --help` answers at once."""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from capo_rl import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 after an error that the user can mend, 130 after Ctrl-C.

    `capo doctor` of a run that collapsed: 1.
    """
    parser = make_parser()
    options, others = parser.parse_known_args(arguments)
    if options.run is _calibrate:
        options.overrides = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    run: Callable[[argparse.Namespace], int | None] = options.run
    try:
        return run(options) or 0
    except _mendable() as error:
        print(f"capo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # a run that trains takes it as a wish for a checkpoint
        print("capo: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def make_parser() -> argparse.ArgumentParser:
    """The parser of `capo` and its commands."""
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
        usage="capo train RECIPE [--FIELD VALUE ...]",
        add_help=False,
    )
    train.add_argument("-h", "--help", action=_TrainHelp, nargs=0)
    train.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a name that `capo recipes` lists")
    train.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--FIELD VALUE", help="override the recipe")
    train.set_defaults(run=_train)

    calibrate = commands.add_parser(
        "calibrate",
        help="choose thresholds for a rejection rate or a KL, from a few monitored steps",
        description="Watch a recipe's first steps without changing them, and choose thresholds for a target: a share "
        "of the tokens to reject (default: 0.05), or a KL of each update. Writes a YAML fragment for the recipe, and a "
        "picture beside it. Any field of the recipe can be given again, as for `capo train`.",
        usage="capo calibrate RECIPE [--rejection-rate R | --kl-nats X] [--steps N] [--out FILE] [--FIELD VALUE ...]",
        allow_abbrev=False,
    )
    calibrate.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a name that `capo recipes` lists")
    target = calibrate.add_mutually_exclusive_group()
    target.add_argument("--rejection-rate", type=float, metavar="R", help="the share of the tokens to reject")
    target.add_argument("--kl-nats", type=float, metavar="X", help="nats a token that no update should pass")
    calibrate.add_argument("--steps", type=int, metavar="N", help="(default: 3 %% of the run's, in 7 to 50)")
    calibrate.add_argument(
        "--out",
        type=_file,
        metavar="FILE",
        default="thresholds.yaml",
        help="the fragment to write (default: %(default)s)",
    )
    calibrate.set_defaults(run=_calibrate)

    bench = commands.add_parser(
        "bench",
        help="run a grid of experiments",
        description="Run what is missing of a grid of runs, each on one core.",
    )
    bench.add_argument("name", metavar="NAME", help="a YAML file, or the name of one of the package's (experiments/)")
    bench.add_argument("--seeds", type=int, help="only the first so many of its seeds")
    bench.add_argument("--only", nargs="+", default=[], metavar="ARM", help="only these arms")
    bench.add_argument("--quick", action="store_true", help="one seed and 20 steps of each arm, to see that it runs")
    bench.add_argument("--workers", type=int, help="runs at a time (default: the number of cores)")
    bench.add_argument("--results", default="results", metavar="FOLDER", help="(default: %(default)s)")
    bench.set_defaults(run=_bench)

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

    regrade = commands.add_parser(
        "regrade",
        help="grade an evaluation's completions again",
        description="Grade the completions of an evaluation again, from disk, and say how many verdicts changed.",
    )
    regrade.add_argument("folder", metavar="FOLDER", help="the folder of an evaluation")
    regrade.set_defaults(run=_regrade)

    plot = commands.add_parser("plot", help="draw the curves of one run, or of several in one picture")
    plot.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, or NAME=FOLDER for the legend")
    plot.add_argument(
        "--out", type=_picture, metavar="FILE", default="curves.png", help="the picture to write (default: %(default)s)"
    )
    plot.add_argument("--title", default="", help="the picture's title")
    plot.set_defaults(run=_plot)

    report = commands.add_parser("report", help="one HTML page about a run, or about the results of a bench")
    report.add_argument("folder", metavar="FOLDER", help="the folder of a run, or of a bench's results")
    report.add_argument(
        "--out", type=_file, metavar="FILE", default="report.html", help="the page to write (default: %(default)s)"
    )
    report.set_defaults(run=_report)

    explain = commands.add_parser(
        "explain",
        help="one HTML page about a step: which tokens were rejected, and why",
        description="Show the completions of one step token by token: their shifts, which were rejected, and by which "
        "bound. The run must have been trained with capo_tokens_every.",
    )
    explain.add_argument("folder", metavar="RUN", help="the folder of a run")
    explain.add_argument("--step", type=int, metavar="N", help="which step (default: the last that was recorded)")
    explain.add_argument(
        "--out", type=_file, metavar="FILE", default="explain.html", help="the page to write (default: %(default)s)"
    )
    explain.set_defaults(run=_explain)

    recipes = commands.add_parser(
        "recipes",
        help="list the recipes that come with the package, or copy one to edit",
        description="List the recipes that come with the package; print one, or copy it to edit. `capo train NAME` "
        "takes them by name, and a file of that name goes first.",
    )
    recipes.add_argument("name", nargs="?", metavar="NAME", help="print this one")
    recipes.add_argument("--out", type=_file, metavar="FILE", help="copy it there")
    recipes.set_defaults(run=_recipes)

    doctor = commands.add_parser(
        "doctor",
        help="say of a run whether it collapsed, what moved first, and what to try; without one, versions and hardware",
        description="Read what a run logged and say in words whether it collapsed, when, what moved first, how far its "
        "updates went, and which settings to try. Ours or any TRL run: metrics.jsonl, trainer_state.json, TensorBoard "
        "events, or a wandb or trackio export. Without a run: versions and hardware, for a bug report.",
        epilog="Exit status: 0 it lives, 1 it collapsed, 2 it can't be told.",
    )
    doctor.add_argument("path", nargs="?", metavar="RUN", help="the folder of a run, or a file of its figures")
    doctor.add_argument("--versions", action="store_true", help="versions and hardware only")
    doctor.set_defaults(run=_doctor)
    return parser


class _TrainHelp(argparse.Action):
    def __call__(self, *_: Any) -> None:
        from capo_rl.settings.train_help import train_help

        print(train_help(), end="")
        raise SystemExit(0)


def _file(name: str) -> str:
    """A file that can be written, known before the work is done whose result it is to hold."""
    import os

    folder = os.path.dirname(name) or "."
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"{name}: there is no folder {folder}; make it, or give another file")
    if os.path.isdir(name) or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{name}: can't be written; give another file")
    return name


def _picture(name: str) -> str:
    endings = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
    if not name.lower().endswith(endings):
        raise argparse.ArgumentTypeError(f"{name}: a picture's name ends in one of {', '.join(endings)}")
    return _file(name)


def _train(options: argparse.Namespace) -> None:
    # What libraries say to one another about their next versions is not for someone who watches a run.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\.")

    if {"-h", "--help"} & set(options.overrides):
        from capo_rl.settings.train_help import train_help

        print(train_help(options.recipe), end="")
        return

    from capo_rl.settings.recipe_file import find_recipe, first_look

    named, options.recipe = options.recipe, find_recipe(options.recipe)
    if "--help-all" in options.overrides:
        options.overrides = ["--help"]
    else:
        first_look(options.recipe, options.overrides)

    from capo_rl.settings.recipe import read_recipe

    recipe = read_recipe(options.recipe, options.overrides)

    from capo_rl.trainers.train import train

    summary = train(recipe)
    if summary:
        from capo_rl.pages.closing import closing

        rows, following = closing(recipe, named)
        _show(summary, recipe.training.output_dir, rows)
        print(f"next: {following}")


def _recipes(options: argparse.Namespace) -> None:
    from pathlib import Path

    from capo_rl.settings.packaged import first_line, packaged
    from capo_rl.settings.recipe_file import RecipeError

    ours = packaged("recipes")
    if options.name is None:
        if options.out is not None:
            raise RecipeError("--out: which recipe? give a name of `capo recipes`")
        for name, file in ours.items():
            print(f"{name}\n    {first_line(file)}")
        return
    if options.name not in ours:
        raise RecipeError(f"{options.name}: not a recipe of the package; there are {', '.join(ours)}")
    text = ours[options.name].read_text(encoding="utf-8")
    if options.out is None:
        print(text, end="")
    elif Path(options.out).exists():
        raise RecipeError(f"{options.out}: is there already; give another name")
    else:
        Path(options.out).write_text(text, encoding="utf-8")
        print(options.out)


def _calibrate(options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\.")

    from pathlib import Path

    from capo_rl.settings.recipe_file import find_recipe, first_look

    options.recipe = find_recipe(options.recipe)
    first_look(options.recipe, options.overrides)

    from capo_rl.trainers.calibrate import calibrate

    target = {"rejection_rate": options.rejection_rate, "kl_nats": options.kl_nats}
    if set(target.values()) == {None}:
        target["rejection_rate"] = 0.05
    done = calibrate(options.recipe, options.overrides, steps=options.steps, out=options.out, **target)
    if done is not None:
        print(done.text, end="")
        print(f"# {options.out}, {Path(options.out).with_suffix('.png')}")
        print(f"# {done.watching:.1f} s of training steps, {done.choosing:.1f} s to choose")


def _bench(options: argparse.Namespace) -> None:
    from pathlib import Path

    from capo_rl.settings.packaged import packaged
    from capo_rl.testbed.bench import quick, read_bench, run_bench

    path = Path(options.name)
    if not path.is_file() and not options.name.endswith(".yaml"):
        here = Path("experiments", f"{options.name}.yaml")
        path = here if here.is_file() else packaged("experiments").get(options.name, here)
    bench = read_bench(path)
    if options.quick:
        bench = quick(bench)
    run_bench(bench, Path(options.results), seeds=options.seeds, only=options.only, workers=options.workers)
    print(Path(options.results, bench.name))


def _eval(options: argparse.Namespace) -> None:
    import re
    from pathlib import Path

    from capo_rl.evaluation.benchmarks import BENCHMARKS
    from capo_rl.evaluation.evaluate import Settings, compare, evaluate, read_evaluation, read_settings, summarize

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


def _regrade(options: argparse.Namespace) -> None:
    from capo_rl.evaluation.evaluate import read_evaluation, regrade, summarize

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


def _plot(options: argparse.Namespace) -> None:
    from pathlib import Path

    from capo_rl.runs.plots import draw_comparison, draw_run
    from capo_rl.runs.records import read_metrics

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

    from capo_rl.pages.report import write_report

    if not (Path(options.folder) / "run.json").exists():
        from capo_rl.testbed.figures import draw_results

        draw_results(options.folder)
    print(write_report(options.folder, options.out))


def _explain(options: argparse.Namespace) -> None:
    from capo_rl.pages.explain import write_explanation

    print(write_explanation(options.folder, options.step, options.out))


def _doctor(options: argparse.Namespace) -> int:
    from capo_rl.pages.doctor import diagnose, environment, read_log

    if options.path is None or options.versions:
        for name, value in environment().items():
            print(f"{name}: {value}")
        return 0
    log = read_log(options.path)
    diagnosis = diagnose(log)
    print(f"{log.source}\n{diagnosis}")
    return 0 if diagnosis.collapsed is None else 1


def _show(summary: dict[str, Any], folder: str, closing: Sequence[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    def percent(*names: str) -> str:
        return " | ".join(f"{summary[name]:.1%}" if name in summary else "–" for name in names)

    def small(*names: str) -> str:
        return " | ".join(f"{summary[name]:.1e}" if name in summary else "–" for name in names)

    judged = [
        ("tokens rejected", percent("rejection_rate")),
        ("  of those with A > 0 | A < 0", percent("rejection_rate_positive", "rejection_rate_negative")),
    ]
    rows = [
        ("reward, first tenth → last tenth", f"{summary['reward_first']:.3f} → {summary['reward_last']:.3f}"),
        ("completions", f"{summary.get('completions', 0):,.0f}"),
        *(judged if "rejection_rate" in summary else []),
        (
            "KL of an update, mean | max",
            small("kl_measured_mean", "kl_measured_max"),
        ),
        ("time", f"{summary.get('seconds', 0):.0f} s"),
        ("  of it curvature", f"{summary.get('seconds_curvature', 0) / max(summary.get('seconds', 0), 1e-9):.1%}"),
    ]
    table = Table(title=folder, show_header=False, title_justify="left")
    for row in [*rows, *closing]:
        table.add_row(*row)
    Console().print(table)


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


def _mendable() -> tuple[type[Exception], ...]:
    """The errors whose message is all a user needs; of modules that were never imported there are none."""
    names = {
        "capo_rl.settings.recipe_file": "RecipeError",
        "capo_rl.trainers.calibrate": "CalibrationError",
        "capo_rl.runs.data": "DataError",
        "capo_rl.pages.doctor": "DoctorError",
        "capo_rl.runs.models": "ModelError",
        "capo_rl.runs.records": "RunFolderError",
        "capo_rl.testbed.bench": "BenchError",
        "capo_rl.pages.report": "ReportError",
        "capo_rl.pages.explain": "ExplainError",
        "capo_rl.evaluation.benchmarks": "BenchmarkError",
        "capo_rl.evaluation.evaluate": "EvaluationError",
    }
    return tuple(getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules)


if __name__ == "__main__":
    sys.exit(main())
