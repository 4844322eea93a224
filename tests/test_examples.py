"""The examples run, with the README's two changed lines and without them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("stock", [False, True])
def test_the_trl_script_trains(tmp_path, stock, capsys):
    spec = importlib.util.spec_from_file_location("trl_script", EXAMPLES / "trl_script.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    first, last = script.main(["--max-steps", "2", "--output-dir", str(tmp_path), *(["--stock"] if stock else [])])
    assert 0 <= first <= 1 and 0 <= last <= 1
    assert "reward of the first tenth" in capsys.readouterr().out
