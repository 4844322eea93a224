"""The commands for reading a run: `capo plot`, `capo report`, `capo explain` and `capo doctor`."""

from __future__ import annotations

import argparse

from capo_rl.cli.options import Commands, a_file, a_picture


def add_plot(commands: Commands) -> None:
    plot = commands.add_parser("plot", help="draw the curves of one run, or of several in one picture")
    plot.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, or NAME=FOLDER for the legend")
    plot.add_argument(
        "--out",
        type=a_picture,
        metavar="FILE",
        default="curves.png",
        help="the picture to write (default: %(default)s)",
    )
    plot.add_argument("--title", default="", help="the picture's title")
    plot.set_defaults(run=_plot)


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


def add_report(commands: Commands) -> None:
    report = commands.add_parser("report", help="one HTML page about a run, or about the results of a bench")
    report.add_argument("folder", metavar="FOLDER", help="the folder of a run, or of a bench's results")
    report.add_argument(
        "--out", type=a_file, metavar="FILE", default="report.html", help="the page to write (default: %(default)s)"
    )
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    from pathlib import Path

    from capo_rl.pages.report import write_report

    if not (Path(options.folder) / "run.json").exists():
        from capo_rl.testbed.results import draw_results

        draw_results(options.folder)
    print(write_report(options.folder, options.out))


def add_explain(commands: Commands) -> None:
    explain = commands.add_parser(
        "explain",
        help="one HTML page about recorded steps: which tokens were rejected, and why",
        description="Show the completions of recorded steps token by token: their shifts, which were rejected, and "
        "by which bound. The run must have been trained with capo_tokens_every.",
    )
    explain.add_argument("folder", metavar="RUN", help="the folder of a run")
    explain.add_argument(
        "--step", type=int, metavar="N", help="which step it opens on (default: the one with the most rejections)"
    )
    explain.add_argument(
        "--out", type=a_file, metavar="FILE", default="explain.html", help="the page to write (default: %(default)s)"
    )
    explain.set_defaults(run=_explain)


def _explain(options: argparse.Namespace) -> None:
    from capo_rl.pages.explain import write_explanation

    print(write_explanation(options.folder, options.step, options.out))


def add_doctor(commands: Commands) -> None:
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


def _doctor(options: argparse.Namespace) -> int:
    from capo_rl.pages.doctor import diagnose
    from capo_rl.pages.environment import environment
    from capo_rl.pages.run_log import read_log

    if options.path is None or options.versions:
        for name, value in environment().items():
            print(f"{name}: {value}")
        return 0
    log = read_log(options.path)
    diagnosis = diagnose(log)
    print(f"{log.source}\n{diagnosis}")
    return 0 if diagnosis.collapsed is None else 1
