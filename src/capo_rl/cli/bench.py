"""The command of the testbed: `capo bench`."""

from __future__ import annotations

import argparse

from capo_rl.cli.options import Commands


def add_bench(commands: Commands) -> None:
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
