"""Every figure and table of a bench's results."""

from __future__ import annotations

from pathlib import Path

from capo_rl.testbed.arms import Arms
from capo_rl.testbed.bench import read_results
from capo_rl.testbed.figures import FIGURES
from capo_rl.testbed.tables import TABLES


def draw_results(folder: str | Path) -> list[Path]:
    """Draw every figure and table whose arms are there into `figures/` and `tables/` of a bench's results.

    Raises `BenchError` if there are no results.
    """
    folder = Path(folder)
    arms: Arms = {}
    for result in read_results(folder):
        arms.setdefault(result["arm"], []).append(result)
    drawn = []
    for kind, things in (("figures", FIGURES), ("tables", TABLES)):
        (folder / kind).mkdir(exist_ok=True)
        for name, thing in things.items():
            if (path := thing(arms, folder / kind / name)) is not None:
                drawn.append(path)
    return drawn
