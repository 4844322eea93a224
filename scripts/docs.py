"""Fill what README.md and docs/*.md say of the code and of results/: tables between marks, and numbers in the text.

python scripts/docs.py              # rewrites the pages
python scripts/docs.py --check      # names those that are not as they would be drawn; the suite compares too

`<!-- drawn: NAME -->` to `<!-- /drawn -->` holds what the function of that name gives, and `4,608<!-- =NAME -->` is one
number. The names are those of `BLOCKS` and `NUMBERS`.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path

from capo_rl.settings.own_fields import CAPOFields
from capo_rl.settings.train_help import GROUPS
from compatibility import table as compatibility
from docs_costs import COSTS
from docs_numbers import NUMBERS, TABLES, markdown

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "capo_rl"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_BLOCK = re.compile(r"<!-- drawn: (\S+) -->.*?<!-- /drawn -->", re.DOTALL)
_NUMBER = re.compile(r"[^\s|*(\[]+<!-- =(\S+) -->")


def room(file: Path) -> str:
    """The room of a file: the folder under the package, or the file itself where it stands in none."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def used(file: Path) -> set[str]:
    """The rooms that a file imports from, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "capo_rl":
            parts = (node.module or "").split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return {name for name in names if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()}


def edges() -> dict[str, set[str]]:
    """For each room those it uses; without what it reaches through another."""
    direct: dict[str, set[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.name != "__init__.py" or file.parent != PACKAGE:
            direct.setdefault(room(file), set()).update(used(file) - {room(file)})

    def reach(name: str) -> set[str]:
        return set().union(*({one} | reach(one) for one in direct.get(name, ())))

    return {
        name: {one for one in ones if not any(one in reach(other) for other in ones)} for name, ones in direct.items()
    }


def docstring(file: Path) -> str:
    """A file's docstring on one line."""
    return " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split())


def phrase(file: Path) -> str:
    """What a file says it is for: the first sentence of its docstring."""
    return re.split(r"(?<=\.)\s", docstring(file), maxsplit=1)[0].rstrip(".:")


def rooms() -> str:
    """The picture, from the highest room down, and the files of each."""
    arrows = edges()
    lines = ["```mermaid", "graph TD"]
    lines += [f"  {name} --> {one}" for name in sorted(arrows) for one in sorted(arrows[name])]
    lines += ["```", ""]

    @cache
    def level(name: str) -> int:
        return 1 + max((level(one) for one in arrows.get(name, ())), default=0)

    for name in sorted(arrows, key=lambda each: (level(each), each)):
        folder = PACKAGE / name
        if not folder.is_dir():
            lines += [f"**`{name}.py`**: {phrase(folder.with_suffix('.py'))}.", ""]
            continue
        files = [file for file in sorted(folder.rglob("*.py")) if file.name != "__init__.py"]
        rows = [[f"`{file.relative_to(folder).as_posix()}`", phrase(file).replace("|", "\\|")] for file in files]
        lines += [f"**`{name}/`** {docstring(folder / '__init__.py')}", "", markdown(["file", ""], rows), ""]
    return "\n".join(lines).rstrip()


def settings() -> str:
    """A table for each group of CAPO's fields: name, default, choices and help."""
    known = {field.name: field for field in fields(CAPOFields)}
    lines = []
    for group, names in GROUPS.items():
        rows = []
        for name in names:
            field = known[name]
            default = "null" if field.default is None else str(field.default).lower().replace("e-0", "e-")
            choices = field.metadata.get("choices")
            said = " ".join(str(field.metadata["help"]).replace("%%", "%").replace("|", "\\|").split())
            said += f" One of {', '.join(choices)}." if choices else ""
            rows.append([f"`{name}`", f"`{default}`", said])
        lines += [f"## {group[0].upper()}{group[1:]}", "", markdown(["field", "default", ""], rows), ""]
    return "\n".join(lines).rstrip()


BLOCKS: dict[str, Callable[[], str]] = (
    {"rooms": rooms, "settings": settings, "compatibility": compatibility} | TABLES | COSTS
)


def page(text: str) -> str:
    """A page with its drawn parts and numbers made anew.

    Raises `KeyError` for a name that is neither in `BLOCKS` nor in `NUMBERS`.
    """
    text = _BLOCK.sub(lambda found: f"<!-- drawn: {found[1]} -->\n\n{BLOCKS[found[1]]()}\n\n<!-- /drawn -->", text)
    return _NUMBER.sub(lambda found: f"{NUMBERS[found[1]]()}<!-- ={found[1]} -->", text)


def named(text: str) -> set[str]:
    """What a page has drawn in it."""
    return {*_BLOCK.findall(text), *_NUMBER.findall(text)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill the pages' tables and numbers from the code and from results/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page would change")
    check = parser.parse_args().check
    changed = []
    for path in PAGES:
        old = path.read_text(encoding="utf-8")
        if (new := page(old)) != old:
            changed.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.write_text(new, encoding="utf-8")
    if changed:
        print("stale:" if check else "written:", *changed)
    sys.exit(check and bool(changed))


if __name__ == "__main__":
    main()
