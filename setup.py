"""Everything is in pyproject.toml but this: a wheel takes recipes/ and the grids of experiments/ along."""

from pathlib import Path
from shutil import copy2

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    def run(self):
        super().run()
        if self.editable_mode:  # which finds them where they are
            return
        for folder in ("recipes", "experiments"):
            for file in Path(folder).rglob("*"):
                if file.is_file() and (folder == "recipes" or file.suffix == ".yaml"):
                    copy = Path(self.build_lib, "capo_rl", file)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy2(file, copy)


setup(cmdclass={"build_py": BuildWithRecipes})
