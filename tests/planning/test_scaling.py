"""What docs/scaling.md says that a step holds and hands over is what it holds and hands over."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

SCALING = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "scaling.py"))
Size = SCALING["Size"]
SIZES = [Size(48, 8, 16, 256), Size(40, 4, 24, 300), Size(1, 3, 8, 64)]


@pytest.mark.parametrize("size", SIZES)
def test_formulas_are_what_is_counted(size):
    found = SCALING["measured"](size)
    for name, (predicted, counted) in SCALING["compared"](found).items():
        assert predicted == counted, name
        assert (counted > 0) == ("handed" not in name and "step" not in name), name  # alone there is nobody to tell


@pytest.mark.parametrize("processes", [2, 4])
def test_formulas_with_several_processes(processes):
    found = SCALING["together"](replace(SIZES[0], processes=processes))
    for name, (predicted, counted) in SCALING["compared"](found).items():
        assert predicted == counted > 0, name


def test_constants_of_seconds_are_found_again():
    constants = [2e-11, 0.0, 3e-9, 1e-9]
    points = []
    for size in [*SIZES, Size(96, 8, 16, 256), Size(48, 8, 32, 512)]:
        point = {**vars(size), "rows": size.vocabulary // 2}
        each = SCALING["work"](size, point["rows"])
        points.append(point | {"step, seconds": sum(c * w for c, w in zip(constants, each, strict=True))})
    assert SCALING["fitted"](points) == pytest.approx(constants, rel=1e-6, abs=1e-15)
