"""Pages that are drawn from the code are as the code is."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["architecture", "settings"])
def test_a_page_is_as_its_script_draws_it(name):
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert script(name).page(text) == text, f"run python scripts/{name}.py"


def test_every_field_is_in_a_group():
    module = script("settings")
    grouped = [name for names in module.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(field.name for field in module.fields(module.CAPOFields))


def test_every_file_says_what_it_is_for():
    module = script("architecture")
    files = [file for file in module.PACKAGE.rglob("*.py") if file.name != "__init__.py"]
    assert not [file.name for file in files if not module.phrase(file)]


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda page: page.stem
)
def test_files_and_pages_that_are_named_are_there(page):
    text = page.read_text(encoding="utf-8")
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link} - {""}
    assert not [link for link in links if not (page.parent / link).exists()]
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", text))
    places = (ROOT, ROOT / "src" / "capo_rl", ROOT / "src" / "capo_rl" / "curvature", ROOT / "src", page.parent)
    theirs = ("trainer/", "transformers/", "trl/", "verl/")
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert not [name for name in missing if not name.startswith(theirs)]
