"""The package's types are there for others: a strict consumer of everything that it exports."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import capo_rl

CONSUMER = Path(__file__).parent / "consumer.py"


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """`mypy --strict` where the package alone is installed: torch and TRL take a minute to read."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    folder = tmp_path_factory.mktemp("types")
    venv.create(folder / "env")
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    (packages / "capo_rl").symlink_to(Path(capo_rl.__file__).parent)
    (folder / "mypy.ini").write_text("[mypy]\nstrict = true\nignore_missing_imports = true\n")

    def run(file: Path) -> str:
        python = folder / "env" / "bin" / "python"
        places = ["--config-file", str(folder / "mypy.ini"), "--cache-dir", str(folder / "cache")]
        command = [sys.executable, "-m", "mypy", *places, "--python-executable", str(python), str(file)]
        return subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout

    return run


def test_a_strict_consumer_is_content(check):
    assert check(CONSUMER).startswith("Success"), check(CONSUMER)


def test_and_a_wrong_one_is_told(check, tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from capo_rl import Alarm, TrustRegion\nAlarm(factor='5')\nTrustRegion(budgett=1.0)\n")
    assert re.findall(r"\[([\w-]+)\]", check(wrong)) == ["arg-type", "call-arg"]


def test_it_uses_everything_that_is_exported():
    (names,) = re.findall(r"from capo_rl import \((.*?)\)", CONSUMER.read_text(encoding="utf-8"), re.DOTALL)
    assert sorted(re.findall(r"\w+", names)) == sorted(capo_rl.__all__)
