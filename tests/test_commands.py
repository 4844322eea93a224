"""Every command in the README, CONTRIBUTING, the docs and the recipes is one that the real parsers take."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from capo_rl.cli import make_parser
from capo_rl.settings.packaged import packaged
from capo_rl.settings.recipe import read_recipe
from capo_rl.settings.recipe_file import find_recipe, first_look

ROOT = Path(__file__).parents[1]
FILES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *sorted((ROOT / "docs").glob("*.md"))),
    *(file for kind in ("recipes", "experiments") for file in packaged(kind).values()),
]
COMMANDS = ("train", "calibrate", "bench", "eval", "regrade", "plot", "report", "explain", "recipes", "doctor")
START = re.compile(rf"(?:\bcapo|-m capo_rl\.cli) (?=(?:{'|'.join(COMMANDS)})\b)")
HERE = ["--use_cpu", "true", "--bf16", "false"]


def commands(file: Path) -> list[str]:
    """The commands of a file: lines of a block or a comment, and what stands in backticks; without what is before."""
    text = re.sub(r"\\\n|\n {10,}(?=\[--)", " ", file.read_text(encoding="utf-8"))  # a line that goes on
    found = re.findall(r"`(capo [^`]+)`", text)
    for line in text.splitlines():
        if re.match(r"(    |#|\t)", line) and "`" not in line.split("  #")[0] and START.search(line):
            found.append(line)
    return [line[match.end() :].split(" #")[0].strip() for line in found if (match := START.search(line))]


def words(command: str) -> list[str]:
    """A command's words with something real for each placeholder."""
    plain = re.sub(r"[\[\]|]|\.\.\.|--FIELD VALUE", " ", command)
    if command.split()[0] in ("train", "calibrate") and command.split()[1:2] == ["..."]:
        plain = plain.replace(command.split()[0], f"{command.split()[0]} RECIPE", 1)
    said = shlex.split(plain)
    for i, word in enumerate(said):
        if word == "RECIPE":
            said[i] = "qwen2.5_math_7b/capo_aggressive" if "--vllm" in command else "quickstart"  # one with vLLM
        elif re.fullmatch(r"[A-Z]+", word) and said[i - 1].startswith("--"):
            said[i] = "1"
        elif "NAME" in word:
            said[i] = word.replace("NAME", "main")
        elif re.match(r"PATH/TO/", word):
            said[i] = "arithmetic"
    return said


def check(command: str) -> None:
    """Raises for a command that `capo` would not take."""
    said = words(command)
    if len(said) == 1 and said[0] not in ("recipes", "doctor"):
        return  # the name of a command, in a sentence
    options, others = make_parser().parse_known_args(said)
    if said[0] == "plot":  # of a run; `report` draws the results of a bench
        assert not [run for run in options.runs if os.path.isdir(run) and not os.path.exists(f"{run}/metrics.jsonl")]
    if said[0] == "bench":
        assert options.name in packaged("experiments")
    elif said[0] in ("train", "calibrate"):
        overrides = options.overrides if said[0] == "train" else others
        if "--help" in overrides or "--help-all" in overrides:
            return
        first_look(find_recipe(options.recipe), [word for word in overrides if not word.endswith(".jsonl")])
        read_recipe(options.recipe, [*overrides, *HERE])
        return
    assert not others


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


ALL = sorted({command for file in FILES for command in commands(file)})


@pytest.mark.parametrize("command", ALL)
def test_the_parsers_take_it(command):
    check(command)


def test_each_command_is_found_somewhere():
    assert {command.split()[0] for command in ALL} == set(COMMANDS)
    assert len(ALL) > 40


@pytest.mark.parametrize(
    "command",
    [
        *("train recipes/quikstart.yaml", "train RECIPE --capo_tokens_evry 10", "train RECIPE --capo_mode maks"),
        *(
            "train RECIPE --learning-rat 1",
            "bench maine",
            "eval MODEL [--smaples K]",
            "doctor RUN --x",
        ),
        *("plot results/NAME", "calibrate RECIPE --rejection_rat 1", "explain runs/quickstart --steps 1"),
    ],
)
def test_a_renamed_option_would_be_found(command):
    with pytest.raises((SystemExit, ValueError, AssertionError)):
        check(command)


def test_scripts_and_targets_that_are_named_exist():
    text = "\n".join(file.read_text(encoding="utf-8") for file in FILES)
    found = re.findall(r"\bpython ((?:examples|benchmarks|scripts|experiments)/\w+\.py)([^#`\n]*)", text)
    scripts = {script for script, _ in found}
    assert len(scripts) > 3
    assert not [script for script in scripts if not os.path.isfile(script)]
    options = {(script, option) for script, rest in found for option in re.findall(r"(?<!\S)--[a-z-]+", rest)}
    assert ("scripts/release.py", "--write") in options
    assert not [each for each in options if f'"{each[1]}"' not in Path(each[0]).read_text(encoding="utf-8")]
    tests = set(re.findall(r"\btests/[\w/]+\.py\b", text))
    assert "tests/curvature/test_step.py" in tests
    assert not [test for test in tests if not os.path.isfile(test)]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"^    make (\w+)", text, re.MULTILINE)) <= set(targets)
