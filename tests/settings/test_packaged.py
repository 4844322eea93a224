"""An installed package is whole: recipes and benches are inside, go by name, and give way to files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from capo_rl.cli import main
from capo_rl.settings.packaged import first_line, packaged
from capo_rl.settings.recipe import RecipeError, read_recipe
from capo_rl.settings.recipe_file import find_recipe
from conftest import ROOT

FILES = [
    *(file.relative_to(ROOT) for file in (ROOT / "recipes").rglob("*") if file.is_file()),
    *(file.relative_to(ROOT) for file in (ROOT / "experiments").glob("*.yaml")),
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, unpacked as pip unpacks it."""
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools 77 or newer, which builds the wheel, is not installed")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for folder in ("src", "recipes", "experiments"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for file in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    code = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


def test_the_wheel_has_the_recipes_the_benches_and_the_model(installed):
    there = {file.relative_to(installed).as_posix() for file in installed.rglob("*") if file.is_file()}
    assert {f"capo_rl/{file.as_posix()}" for file in FILES} <= there
    assert "capo_rl/embedded/model.safetensors" in there and "capo_rl/py.typed" in there
    modules = {file.relative_to(ROOT / "src").as_posix() for file in (ROOT / "src").rglob("*.py")}
    assert modules == {name for name in there if name.endswith(".py") and not name.startswith("capo_rl/recipes/")}


def test_the_installed_command_finds_its_own_and_writes_to_the_folder_one_stands_in(installed, tmp_path):
    code = (
        "import sys\n"
        "from capo_rl.testbed.bench import read_bench\nfrom capo_rl.cli import main\n"
        "from capo_rl.settings.packaged import packaged\n"
        "bench = read_bench(packaged('experiments')['main'])\n"
        "assert bench.recipe.startswith(sys.argv[1]) and len(bench.arms) > 9, bench.recipe\n"
        "short = ['--max_steps', '1', '--save_strategy', 'no', '--dataset_limit', '32']\n"
        "sys.exit(main(['recipes']) or main(['train', 'quickstart', *short]))\n"
    )
    command = [sys.executable, "-c", code, str(installed)]
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "quickstart\n    The model inside this package" in done.stdout
    assert (tmp_path / "runs" / "quickstart" / "metrics.jsonl").is_file()


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("quickstart") == str(packaged("recipes")["quickstart"])
    assert read_recipe("quickstart").training.output_dir == "runs/quickstart"
    Path("quickstart").write_text("mine")
    assert find_recipe("quickstart") == "quickstart"


def test_a_bench_in_the_folder_goes_before_the_packages(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("experiments").mkdir()
    Path("experiments", "main.yaml").write_text("- mine")
    assert main(["bench", "main"]) == 2
    assert "experiments/main.yaml: needs the fields" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("recipes/quickstart.yaml", "did you mean `quickstart`, which comes with the package"),
        ("qiuckstart", "did you mean `quickstart`, which comes with the package"),
        ("zzz", "or a name that `capo recipes` lists"),
    ],
)
def test_a_recipe_that_is_nowhere_names_the_packages(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=message):
        find_recipe(name)


def test_recipes_are_listed_with_a_line_each(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == list(packaged("recipes"))
    assert all(first_line(file) for kind in ("recipes", "experiments") for file in packaged(kind).values())


def test_a_recipe_is_copied_to_edit_and_nothing_is_overwritten(tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    assert main(["recipes", "quickstart", "--out", str(mine)]) == 0
    assert mine.read_text() == (ROOT / "recipes" / "quickstart.yaml").read_text()
    mine.write_text("edited")
    assert main(["recipes", "quickstart", "--out", str(mine)]) == 2
    assert "is there already; give another name" in capsys.readouterr().err
    assert mine.read_text() == "edited"
    assert main(["recipes", "--out", str(tmp_path / "x.yaml")]) == 2
    assert "which recipe? give a name" in capsys.readouterr().err
    assert main(["recipes", "zzz"]) == 2
    assert "zzz: not a recipe of the package; there are" in capsys.readouterr().err
