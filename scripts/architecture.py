"""Draw docs/architecture.md's picture and list of rooms from the code.

python scripts/architecture.py            # rewrites what stands between the marks; the suite compares
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE, PAGE = ROOT / "src" / "capo_rl", ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn by scripts/architecture.py -->", "<!-- to here -->"


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


def phrase(file: Path) -> str:
    """What a file says it is for: the first sentence of its docstring."""
    said = " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split())
    return re.split(r"(?<=\.)\s", said, maxsplit=1)[0].rstrip(".:") if said else ""


def drawn() -> str:
    """The picture, from the highest room down, and the files of each."""
    arrows = edges()
    lines = ["```mermaid", "graph TD"]
    lines += [f"  {name} --> {one}" for name in sorted(arrows) for one in sorted(arrows[name])]
    lines += ["```", ""]
    depth: dict[str, int] = {}

    def level(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max((level(one) for one in arrows.get(name, ())), default=0)
        return depth[name]

    for name in sorted(arrows, key=lambda each: (level(each), each)):
        folder = PACKAGE / name
        if not folder.is_dir():
            lines += [f"**`{name}.py`**: {phrase(folder.with_suffix('.py'))}.", ""]
            continue
        said = " ".join(
            (ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or "").split()
        )
        lines += [f"**`{name}/`** {said}", "", "| file | |", "|---|---|"]
        files = [file for file in sorted(folder.rglob("*.py")) if file.name != "__init__.py"]
        lines += [
            f"| `{file.relative_to(folder).as_posix()}` | {phrase(file).replace('|', chr(92) + '|')} |"
            for file in files
        ]
        lines.append("")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its drawn part made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{drawn()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
