"""Drawings of matplotlib's as parts of a page, in its colours, light or dark.

A drawing may be anybody's file: of an SVG only what matplotlib draws gets in, and nothing that runs or is fetched.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from xml.etree import ElementTree

from capo_rl.pages.page import Named, ReportError, html_named

_SVG = "{http://www.w3.org/2000/svg}"
_DRAWN = {_SVG + name for name in ("svg", "g", "defs", "clipPath", "path", "rect", "use", "image", "text", "tspan")}
_LEFT_OUT = {_SVG + name for name in ("metadata", "style", "title")}
# What matplotlib draws on a white page, on any: black is the text's colour, and white is none.
_THEME = {"#000000": "currentColor", "#ffffff": "none", "#666666": "var(--soft)"}


def html_figure(path: Path, named: Named | None = None) -> str:
    """A drawing as a part of the page: a panel under its name, or else with its own name and title below it.

    Raises `ReportError`, naming the file, for what matplotlib would not draw.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ReportError(f"{path}: not an SVG ({error}); draw it again") from None
    name = html_id(path.stem)
    title = named.words if named else root.findtext(f"{_SVG}title", default="")
    drawing = _drawing(root, name, path)
    drawing.attrib |= {"role": "img", "aria-label": title or name, "style": f"--width: {root.get('width', '100%')}"}
    svg = f'<div class="wide">{ElementTree.tostring(drawing, encoding="unicode")}</div>'
    if named:
        return f'<figure id="{name}"><figcaption>{html_named(named)}</figcaption>{svg}</figure>\n'
    caption = f"<figcaption><b>{escape(path.stem)}</b> {escape(title)}</figcaption>"
    return f'<figure id="{name}">{svg}{caption}</figure>\n'


def html_id(name: str) -> str:
    """An id for a part of the page that has this name."""
    return re.sub(r"[^\w-]+", "-", name)


def _drawing(element: ElementTree.Element, name: str, path: Path) -> ElementTree.Element:
    """A copy of an SVG element without namespaces, as HTML has it, and with the figure's name before each id.

    The ids, because matplotlib gives out the same ones in every file. Metadata are left out, and style sheets, which
    would hold for the whole page: the page's own has matplotlib's two rules.
    """
    if element.tag not in _DRAWN:
        raise ReportError(f"{path}: holds <{_local(element.tag)}>, which matplotlib does not draw; draw it again")
    copy = ElementTree.Element(_local(element.tag))
    copy.text, copy.tail = element.text, element.tail
    for key, value in element.items():
        key = _local(key)
        elsewhere = key == "href" and not value.startswith(("#", "data:image/png;base64,"))
        if elsewhere or key.lower().startswith("on") or re.search(r"javascript:|url\((?!#)", value, re.IGNORECASE):
            raise ReportError(f"{path}: holds {key}={value[:40]!r}, a script or an address; draw it again")
        pointer = r"^#" if key == "href" else r"(?<=url\()#"
        value = f"{name}-{value}" if key == "id" else re.sub(pointer, f"#{name}-", value)
        if key == "style":
            value = re.sub("(?<=: )#[0-9a-f]{6}", lambda colour: _THEME.get(colour[0], colour[0]), value)
        copy.set(key, value)
    copy.extend([_drawing(child, name, path) for child in element if child.tag not in _LEFT_OUT])
    return copy


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]
