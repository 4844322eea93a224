"""The page on how the code is laid out is drawn from the code."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def script():
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "scripts" / "architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_as_the_script_draws_it():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert script().page(text) == text, "run python scripts/architecture.py"


def test_every_file_says_what_it_is_for():
    module = script()
    files = [file for file in module.PACKAGE.rglob("*.py") if file.name != "__init__.py"]
    assert not [file.name for file in files if not module.phrase(file)]


def test_the_files_that_the_page_names_are_there():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("<!-- drawn")[0]
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", text))
    assert len(named) > 8
    assert not [name for name in named if not (ROOT / "src" / "capo_rl" / name).exists() and not (ROOT / name).exists()]
