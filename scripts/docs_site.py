"""What the site has beside docs/: the pages at the root, the API from docstrings, and the files that pages link to.

mkdocs.yml names what is called here; `make docs` builds the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

import capo_rl

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {
    ROOT / "README.md": "index.md",
    ROOT / "CHANGELOG.md": "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md": "CONTRIBUTING.md",
}
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def place(path: Path) -> str:
    """Where a file of the checkout stands on the site."""
    if path in PAGES:
        return PAGES[path]
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def moved(text: str, page: Path) -> str:
    """A page's text with the links that it needs on the site."""

    def link(found: re.Match[str]) -> str:
        path = (page.parent / found[1]).resolve()
        return posixpath.relpath(place(path) + ("/index.md" if path.is_dir() else ""), posixpath.dirname(place(page)))

    return _LINK.sub(link, text)


def api() -> str:
    """What `from capo_rl import ...` gives, in the order of its list."""
    names = [f"::: capo_rl.{home}.{name}" for name, home in capo_rl._HOMES.items()]
    return "# What `from capo_rl import ...` gives\n\n" + "\n\n".join(names) + "\n"


def linked() -> set[Path]:
    """The files and folders outside of docs/ that pages link to."""
    pages = [*PAGES, *DOCS.glob("*.md")]
    found = {
        (page.parent / link).resolve() for page in pages for link in _LINK.findall(page.read_text(encoding="utf-8"))
    }
    return {path for path in found if not path.is_relative_to(DOCS) and path not in PAGES}


def on_files(files: Files, config: Any) -> Files:
    for path, name in PAGES.items():
        files.append(File.generated(config, name, content=moved(path.read_text(encoding="utf-8"), path)))
    files.append(File.generated(config, "api.md", content=api()))
    there: set[Path] = set()
    for path in linked():
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.is_file())
            listing = "\n".join(f"- [{file.name}]({file.name})" for file in inside)
            name = place(path)
            files.append(File.generated(config, f"{name}/index.md", content=f"# {name}\n\n{listing}\n"))
            there.update(inside)
        else:
            there.add(path)
    for path in sorted(there):
        files.append(File.generated(config, place(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = Path(page.file.abs_src_path or "/")  # none: made above
    return moved(markdown, source) if source.is_relative_to(ROOT) else markdown


def fenced(docstring: str) -> str:
    """A docstring as Markdown: its doctests, and lists in columns, are blocks."""
    parts = []
    for part in re.split(r"\n\n+", docstring):
        kind = "python" if part.startswith(">>> ") else "text" if re.match(r"\S+ {2,}\S", part) else ""
        parts.append(f"```{kind}\n{part}\n```" if kind else part)
    return "\n\n".join(parts)


class Docstrings(griffe.Extension):
    """What mkdocstrings reads, `fenced`."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
