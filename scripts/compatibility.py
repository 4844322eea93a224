"""Which versions the trainer works with: for each row a fresh environment, the trainer's tests in it, and the table.

    python scripts/compatibility.py --envs /tmp/envs [--rows trl-1.15 torch-2.6]

Rows that have a result in results/compatibility/ are left as they are, unless they are named; `python scripts/docs.py`
then writes the table in docs/compatibility.md from all of them. What a row does not name is the newest that fits, as a
user would get it today, but for torch, which is that of constraints.txt. An environment has 1.5 GB (6 where torch comes
with CUDA) and is removed when its row is done. A copy of the checkout, with what is not committed yet, is installed in
it without the project's own bounds, which are what is tried.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "compatibility"
TESTS = [
    *(f"tests/trainers/test_{name}.py" for name in ("trl", "resume", "distributed", "train")),
    *("tests/planning/test_trust_region.py", "tests/runs/test_models.py"),
]
ROWS: dict[str, dict[str, str]] = {
    "trl-1.16": {"trl": "1.16.0"},
    # TRL 1.15 scores tokens in a Triton kernel and has no other way, so here it runs in Triton's interpreter, and that
    # one takes no newer numpy.
    "trl-1.15": {"trl": "1.15.0", "triton": "3.6.0", "numpy": "2.3.5"},
    "trl-1.14": {"trl": "1.14.2"},
    "trl-1.13": {"trl": "1.13.0"},
    "transformers-5.20": {"trl": "1.16.0", "transformers": "5.20.2"},
    "transformers-5.10": {"trl": "1.16.0", "transformers": "5.10.4"},
    "torch-2.15": {"trl": "1.16.0", "torch": "2.15.0"},
    "torch-2.14": {"trl": "1.16.0", "torch": "2.14.1"},
    "python-3.12": {"python": "3.12"},
    "python-3.13": {"python": "3.13"},
    # Each of the project's own dependencies at its lower bound. uv would take the newest datasets all the same.
    "lowest": {"resolution": "lowest-direct", "datasets": "4.7.0"},
}
_NOT_PACKAGES = ("python", "resolution")
SHOWN = ("trl", "transformers", "torch", "accelerate", "peft", "datasets", "numpy")


def requirements(row: dict[str, str]) -> list[str]:
    """What pip is asked for: the project's dependencies, with the row's versions in place of its bounds."""
    asked = [f"{name}=={version}" for name, version in row.items() if name not in _NOT_PACKAGES]
    return asked + [
        each
        for each in _project()["dependencies"]
        if re.match(r"[\w-]+", each)[0] not in row  # type: ignore[index]
    ]


def tools() -> list[str]:
    """What runs the tests."""
    return [tool for tool in _project()["optional-dependencies"]["dev"] if re.match("pytest|hypothesis|beartype", tool)]


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def python_of(row: dict[str, str]) -> str:
    """The interpreter that a row asks for, by default this one. Raises `SystemExit` where there is none."""
    name = f"python{row['python']}" if "python" in row else sys.executable
    if (found := shutil.which(name)) is None:
        raise SystemExit(f"{name}: not on the PATH; install it, or leave the row out")
    return found


def try_row(row: dict[str, str], folder: Path) -> dict[str, Any]:
    """Build the environment of a row, run the tests in it, and say what came of it."""
    python, checkout = folder / "bin" / "python", folder / "checkout"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python_of(row), "-m", "venv", str(folder)], check=True)
    copy_checkout(checkout)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    if "resolution" in row:
        uv = [str(python), "-m", "uv", "pip", "install", "--quiet", "--python", str(python)]
        commands = [[*pip, "uv"], [*uv, "--resolution", row["resolution"], *requirements(row)], [*uv, *tools()]]
    else:
        torch = (
            [next(filter(re.compile("torch==").match, _lines(ROOT / "constraints.txt")))] if "torch" not in row else []
        )
        commands = [[*pip, *torch, *requirements(row), *tools()]]
    for command in [*commands, [*pip, "--no-deps", "--editable", str(checkout)]]:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.lower().lstrip().startswith(("error", "×"))]
            return {"asked": row, "verdict": "can't be installed", "causes": dict.fromkeys(errors[:3], 1)}
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {SHOWN}}}))"
    found = json.loads(subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout)
    report = folder / "report.xml"
    # Warnings are errors in the project's own environment; those of other versions are their authors' to mend.
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--show-capture=no",
        "-o",
        "filterwarnings=default",
        "--junitxml",
        report,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-m", "pytest", *options, *TESTS],
        cwd=checkout,
        capture_output=True,
        text=True,
        env=environment,
    )
    outcome = (
        read_report(report)
        if report.exists()
        else {"verdict": "fails", "causes": dict.fromkeys(done.stderr.splitlines()[-1:], 1)}  # not one test began
    )
    return {"asked": row, "versions": found, **outcome}


def copy_checkout(to: Path) -> None:
    """The files that git has, or would take, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def read_report(path: Path) -> dict[str, Any]:
    """Counts of a pytest run, and its failures by the first line of their messages, from its JUnit XML."""
    suite = ET.parse(path).getroot().find("testsuite")
    assert suite is not None
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    causes = Counter(_cause(case) for case in suite.iter() if case.tag in ("failure", "error"))
    return {
        "verdict": "fails" if failed or not count["tests"] else "works",
        "passed": count["tests"] - failed - count["skipped"],
        "failed": failed,
        "skipped": count["skipped"],
        "seconds": round(float(suite.get("time", 0))),
        "causes": dict(causes.most_common(5)),
    }


def _cause(case: ET.Element) -> str:
    """The exception that a test failed by; of a test that starts processes, the exception in those."""
    said = f"{case.text or ''}\n{case.get('message') or ''}"
    named = re.findall(r"^(?:E +)?(?:\[rank\d+\]: *)?([\w.]*(?:Error|Exception): .+)$", said, flags=re.MULTILINE)
    inner = [each for each in named if not re.match(r"(AssertionError|.*ChildFailedError):", each)]
    return (inner or named or said.strip().splitlines() or ["no message"])[0][:300]


def table() -> str:
    """The rows as Markdown, in the order of `ROWS`; a row without a result says so."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}
    lines = [f"| row | {' | '.join(SHOWN[:4])} | passed | failed | verdict |", "|---|" + "---|" * 7]
    for name, row in ROWS.items():
        result = results.get(name, {"verdict": "not tried"})
        versions = result.get("versions", row)
        cells = [*(versions.get(each, "–") for each in SHOWN[:4])]
        cells += [str(result.get("passed", "–")), str(result.get("failed", "–")), result["verdict"]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the trainer's tests with other versions of its libraries.")
    parser.add_argument("--envs", type=Path, required=True, help="a folder for the environments, 1.5 to 6 GB at a time")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="only these rows, again if they have a result")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in options.rows or [name for name in ROWS if not (RESULTS / f"{name}.json").exists()]:
        result = try_row(ROWS[name], options.envs / name)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(options.envs / name, ignore_errors=True)
        print(f"{name}: {result['verdict']}", result.get("passed", ""), result.get("causes") or "", flush=True)


if __name__ == "__main__":
    main()
