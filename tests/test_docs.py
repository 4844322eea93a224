"""Pages say what the code and the results are."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import docs
from capo_rl.settings.own_fields import CAPOFields
from capo_rl.settings.train_help import GROUPS
from capo_rl.statistics import mean_and_error
from capo_rl.testbed.arms import collapse, final_accuracy
from capo_rl.testbed.tables import TABLES
from docs_numbers import RESULTS, arms

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", docs.PAGES, ids=lambda page: page.stem)
def test_a_page_is_as_it_would_be_drawn(page):
    text = page.read_text(encoding="utf-8")
    assert docs.page(text) == text, "run python scripts/docs.py"


def test_everything_that_can_be_drawn_stands_on_a_page():
    found = set().union(*(docs.named(page.read_text(encoding="utf-8")) for page in docs.PAGES))
    assert found == {*docs.BLOCKS, *docs.NUMBERS}


def test_a_stale_table_and_a_stale_number_are_drawn_anew():
    old = "before\n<!-- drawn: sharpness -->\n| 1 |\n<!-- /drawn -->\nof (0<!-- =sharpness/runs --> runs)"
    new = docs.page(old)
    assert new.startswith("before\n<!-- drawn: sharpness -->\n\n| known before the step | R² |")
    assert new.endswith("|\n\n<!-- /drawn -->\nof (12<!-- =sharpness/runs --> runs)")
    with pytest.raises(KeyError, match="nowhere"):
        docs.page("0<!-- =nowhere -->")


@pytest.mark.parametrize("bench", sorted(path.parents[1].name for path in RESULTS.glob("*/tables/methods.json")))
def test_the_tables_of_a_bench_are_of_the_runs_that_are_there(bench, tmp_path):
    # `capo report results/NAME` draws them.
    for name in TABLES.keys() - {"methods"}:
        drawn, there = TABLES[name](arms(bench), tmp_path / name), RESULTS / bench / "tables" / f"{name}.json"
        assert (drawn and drawn.read_text(encoding="utf-8")) == (
            there.read_text(encoding="utf-8") if there.exists() else None
        )
    # Of this one the intervals, which are drawn 2,000 times, take too long to be said again here.
    table = json.loads((RESULTS / bench / "tables" / "methods.json").read_text(encoding="utf-8"))
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
    assert rows.keys() == arms(bench).keys()
    for name, runs in arms(bench).items():
        mean, error = mean_and_error(map(final_accuracy, runs))
        assert rows[name]["seeds"] == str(len(runs))
        assert rows[name]["accuracy, mean ± s.e."] == (f"{mean:.3f} ± {error:.3f}" if len(runs) > 1 else f"{mean:.3f}")
        assert rows[name]["collapsed"] == f"{sum(collapse(run) is not None for run in runs)}/{len(runs)}"


def test_every_field_is_in_a_group():
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(field.name for field in fields(CAPOFields))


def test_every_file_says_what_it_is_for():
    files = [file for file in docs.PACKAGE.rglob("*.py") if file.name != "__init__.py"]
    assert not [file.name for file in files if not docs.phrase(file)]


@pytest.mark.parametrize("page", docs.PAGES, ids=lambda page: page.stem)
def test_files_and_pages_that_are_named_are_there(page):
    text = page.read_text(encoding="utf-8")
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link} - {""}
    assert not [link for link in links if not (page.parent / link).exists()]
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", text))
    places = (ROOT, ROOT / "src" / "capo_rl", ROOT / "src" / "capo_rl" / "curvature", ROOT / "src", page.parent)
    theirs = ("trainer/", "transformers/", "trl/", "verl/")
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert not [name for name in missing if not name.startswith(theirs)]


def test_the_site_has_every_page():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    beside = {"index.md", "api.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    assert set(re.findall(r"\w+\.md", nav)) == {page.name for page in (ROOT / "docs").glob("*.md")} | beside


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: make docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "api.html").exists()
