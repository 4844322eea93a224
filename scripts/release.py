"""Try a release as its user would meet it: version, changelog, wheel and sdist. Nothing is uploaded.

    python scripts/release.py 0.2.0              # on a copy of the last commit; changes nothing here
    python scripts/release.py 0.2.0 --write      # and if all is well, the version and the changelog's date, and dist/

The version has to be above the present one, or the present one where the changelog calls it unreleased. Wheel and sdist
are built apart, read by `twine check --strict`, and installed one after the other into an environment that was empty;
from an empty folder `capo` then has to know its version and its recipes, and train two steps. That takes 2 GB.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION_FILE, CHANGELOG = Path("src/capo_rl/__init__.py"), Path("CHANGELOG.md")


class ReleaseError(ValueError):
    """What keeps a version from being released; the message names the file and the fix."""


def with_version(source: str, version: str) -> str:
    """`__init__.py` with another version.

    Raises `ReleaseError` for a version that is none, or is below the present one.

    >>> with_version('__version__ = "0.1.0"', "0.2.0")
    '__version__ = "0.2.0"'
    """
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ReleaseError(f"{version}: give three numbers, as in 0.2.0")
    (present,) = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    if [*map(int, version.split("."))] < [*map(int, present.split("."))]:
        raise ReleaseError(f"{version} is below {present} of {VERSION_FILE}: give a version above it")
    return source.replace(f'__version__ = "{present}"', f'__version__ = "{version}"')


def with_date(changelog: str, version: str, day: date) -> str:
    """The changelog with a date in its topmost heading.

    Raises `ReleaseError` where that is another version's, or was released.

    >>> with_date("# Changelog\\n\\n## 0.2.0, unreleased\\n\\n- A line.\\n", "0.2.0", date(2027, 1, 31)).splitlines()[2]
    '## 0.2.0, 2027-01-31'
    """
    found = re.search(r"^## (\S+), (.+)$", changelog, re.MULTILINE)
    if found is None or found.groups() != (version, "unreleased"):
        there = found[0] if found else "no heading"
        raise ReleaseError(f"{CHANGELOG} has {there!r} on top: begin it with '## {version}, unreleased' and its lines")
    if not re.match(r"\s*- ", changelog[found.end() :]):
        raise ReleaseError(f"{CHANGELOG} says nothing of {version}: add its lines")
    return changelog.replace(found[0], f"## {version}, {day.isoformat()}", 1)


def said(*command: object, cwd: Path) -> str:
    """What a command prints; raises `CalledProcessError` where it fails."""
    print("$", *command, flush=True)
    return subprocess.run([*map(str, command)], cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout


def environment(folder: Path, *packages: object) -> Path:
    """A fresh environment with these packages; returns the folder of its commands."""
    venv.create(folder, with_pip=True)
    if packages:
        said(folder / "bin/python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *packages, cwd=folder)
    return folder / "bin"


def try_installed(commands: Path, folder: Path, version: str) -> None:
    """What the README promises of an installed package, in an empty folder."""
    folder.mkdir()
    if (knows := said(commands / "capo", "--version", cwd=folder).strip()) != f"capo-rl {version}":
        raise ReleaseError(f"the installed package says {knows!r} and not capo-rl {version}")
    if "quickstart" not in said(commands / "capo", "recipes", cwd=folder):
        raise ReleaseError("the installed package has no quickstart among its recipes: see setup.py and MANIFEST.in")
    said(commands / "capo", "train", "quickstart", "--max_steps", 2, "--disable_tqdm", "true", cwd=folder)
    said(commands / "capo", "doctor", "runs/quickstart", cwd=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build and try a release; nothing is uploaded.")
    parser.add_argument("version")
    parser.add_argument("--write", action="store_true", help="then write the version, the changelog's date and dist/")
    options = parser.parse_args()
    try:
        if said("git", "status", "--porcelain", cwd=ROOT):
            raise ReleaseError("the checkout has changes: commit them, since a copy of the commit is tried")
        new = {
            VERSION_FILE: with_version((ROOT / VERSION_FILE).read_text(encoding="utf-8"), options.version),
            CHANGELOG: with_date((ROOT / CHANGELOG).read_text(encoding="utf-8"), options.version, date.today()),
        }
        with tempfile.TemporaryDirectory() as place:
            copy = Path(place, "copy")
            said("git", "clone", "-q", "--depth", 1, f"file://{ROOT}", copy, cwd=ROOT)
            for file, text in new.items():
                (copy / file).write_text(text, encoding="utf-8")
            tools = environment(Path(place, "tools"), "build", "twine")
            said(tools / "python", "-m", "build", "-q", cwd=copy)
            wheel, sdist = (next((copy / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
            said(tools / "twine", "check", "--strict", wheel, sdist, cwd=copy)
            commands = environment(Path(place, "env"), wheel)
            try_installed(commands, Path(place, "by wheel"), options.version)
            again = ("--force-reinstall", "--no-deps", sdist)
            said(commands / "python", "-m", "pip", "install", "-q", *again, cwd=copy)
            try_installed(commands, Path(place, "by sdist"), options.version)
            if options.write:
                for file, text in new.items():
                    (ROOT / file).write_text(text, encoding="utf-8")
                shutil.copytree(copy / "dist", ROOT / "dist", dirs_exist_ok=True)
    except ReleaseError as error:
        sys.exit(f"release.py: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"release.py: {' '.join(map(str, error.cmd))} failed with {error.returncode}; its message is above")
    print(
        f"{options.version}: wheel and sdist are whole"
        + (", and in dist/" if options.write else "; nothing was written")
    )


if __name__ == "__main__":
    main()
