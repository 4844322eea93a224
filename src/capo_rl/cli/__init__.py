"""The command `capo`. Nothing heavy is imported before a command is known, so `capo --help` answers at once.

Commands of one kind share a file, in which what a command takes stands beside what it does.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

from capo_rl import __version__
from capo_rl.cli import bench, evaluation, pages, training


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 after an error that the user can mend, 130 after Ctrl-C.

    `capo doctor` of a run that collapsed: 1.
    """
    parser = make_parser()
    options, others = parser.parse_known_args(arguments)
    if options.run is training.run_calibrate:
        options.overrides = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    run: Callable[[argparse.Namespace], int | None] = options.run
    try:
        return run(options) or 0
    except _mendable() as error:
        print(f"capo: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains while it flushes at exit
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:  # a run that trains takes it as a wish for a checkpoint
        print("capo: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def make_parser() -> argparse.ArgumentParser:
    """The parser of `capo` and its commands."""
    parser = argparse.ArgumentParser(
        prog="capo",
        description="RL post-training that does not collapse: steps as long as a trust region allows, or the mask of "
        "Curvature-Aware Policy Optimization (CAPO, arXiv 2510.00819).",
    )
    parser.add_argument("--version", action="version", version=f"capo-rl {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    training.add_train(commands)
    training.add_calibrate(commands)
    bench.add_bench(commands)
    evaluation.add_evaluate(commands)
    evaluation.add_regrade(commands)
    pages.add_plot(commands)
    pages.add_report(commands)
    pages.add_explain(commands)
    training.add_recipes(commands)
    pages.add_doctor(commands)
    return parser


def _mendable() -> tuple[type[Exception], ...]:
    """The errors whose message is all a user needs; of modules that were never imported there are none."""
    names = {
        "capo_rl.settings.recipe_file": "RecipeError",
        "capo_rl.thresholds.choice": "CalibrationError",
        "capo_rl.runs.data": "DataError",
        "capo_rl.pages.run_log": "DoctorError",
        "capo_rl.runs.models": "ModelError",
        "capo_rl.runs.records": "RunFolderError",
        "capo_rl.testbed.bench": "BenchError",
        "capo_rl.pages.report": "ReportError",
        "capo_rl.pages.explain": "ExplainError",
        "capo_rl.evaluation.benchmarks": "BenchmarkError",
        "capo_rl.evaluation.folder": "EvaluationError",
    }
    return tuple(getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules)
