"""An HTML page that needs nothing beside it: no network and no script; text on it is escaped, whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from typing import Any, NamedTuple


class ReportError(ValueError):
    """A folder or file that can't be reported on; the message names the reason and the fix."""


class Section(NamedTuple):
    """A heading and what is below it, in HTML.

    `parts` are ids in there that the table of contents lists; with `folded`, which then says what is in it, the body is
    shown on request.
    """

    id: str
    title: str
    body: str
    parts: Iterable[str] = ()
    folded: str = ""


class Named(NamedTuple):
    """Words for a reader, and the field that they stand for, which is told on hovering over them."""

    words: str
    field: str


class Link(NamedTuple):
    """Words, and the id of the part of the page that they lead to."""

    words: str
    id: str


def html_table(
    columns: Iterable[str | Named],
    rows: Iterable[Iterable[Any]],
    name: str = "",
    caption: str = "",
    note: str = "",
) -> str:
    """A table in a frame that scrolls where the screen is narrow, and shows that it does."""
    head = "".join(f'<th scope="col">{_inline(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    start = f'<table id="{name}">' if name else "<table>"
    table = f"{start}{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    below = f'<p class="note">{escape(note)}</p>\n' if note else ""
    return f'<div class="wide">{table}</div>\n{below}'


def html_folded(title: str, body: str) -> str:
    """A part of a page that is shown on request."""
    return f"<details><summary>{escape(title)}</summary>\n{body}</details>\n"


def html_named(named: Named) -> str:
    """Words, with their field in a hover where it is another."""
    if named.words == named.field:
        return escape(named.words)
    return f'<abbr title="{escape(named.field)}">{escape(named.words)}</abbr>'


def _inline(cell: Any) -> str:
    if isinstance(cell, Named):
        return html_named(cell)
    if isinstance(cell, Link):
        return f'<a href="#{escape(cell.id)}">{escape(cell.words)}</a>'
    return escape(_cell(cell))


def exact(value: Any) -> str:
    """A value exactly as it was set; a dash where there is none."""
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def _cell(value: Any) -> str:
    """A value as a reader wants it; a mean and its error stay on one line.

    >>> [_cell(value) for value in (None, True, 208097.0, 0.0123456, "0.5 ± 0.1")]
    ['–', 'true', '208,097', '0.01235', '0.5\\xa0±\\xa00.1']
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return exact(value).replace(" ± ", "\xa0±\xa0")
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def html_page(title: str, about: str, *sections: Section, lead: str = "", body: str = "", style: str = "") -> str:
    """The whole page, with the sections that have something to show.

    `lead` is HTML that stands before everything else, `body` stands after it all, and `style` is added to the style
    that all pages have. Raises `ReportError` for two parts of one name.
    """
    shown = [section for section in sections if section.body]
    ids = [name for section in shown for name in (section.id, *section.parts)]
    if twice := {name for name in ids if ids.count(name) > 1}:
        raise ReportError(f"two parts of the report are called {', '.join(twice)}; rename the figure or the table")
    contents = listed = ""
    for section in shown:
        parts = " ".join(f'<a href="#{name}">{name}</a>' for name in section.parts)
        contents += f'<li><a href="#{section.id}">{section.title}</a> {parts}</li>\n'
        inner = html_folded(section.folded, section.body) if section.folded else section.body
        listed += f'<section>\n<h2 id="{section.id}">{section.title}</h2>\n{inner}</section>\n'
    nav = f'<nav aria-label="Contents"><ul>\n{contents}</ul></nav>\n' if contents else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{lead}<p>{escape(about)}</p>
{nav}{listed}{body}</body>
</html>
"""


_STYLE = """
:root { color-scheme: light dark; --line: #d4d4d4; --soft: #666; --link: #0060a0; --shade: rgb(0 0 0 / .3); }
:root { --dead: #b3261e; --alive: #1a7f37; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { line-height: 1.2; margin: .5rem 0; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
p, .verdict { max-width: 52rem; }
a { color: var(--link); }
nav ul { padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; }
abbr { text-decoration: underline dotted var(--soft); text-underline-offset: .2em; cursor: help; }
.wide {
  overflow-x: auto;
  background:
    linear-gradient(to right, Canvas 35%, transparent) left / 3rem 100% no-repeat local,
    linear-gradient(to left, Canvas 35%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to right, var(--shade), transparent) left / 1rem 100% no-repeat scroll,
    linear-gradient(to left, var(--shade), transparent) right / 1rem 100% no-repeat scroll;
}
table { border-collapse: collapse; width: max-content; max-width: 76rem; overflow-wrap: normal; }
table { font-size: .875rem; font-variant-numeric: tabular-nums; }
caption, figcaption { padding: .5rem 0; text-align: left; font-size: .875rem; }
th, td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td { max-width: 40rem; overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: .875rem; }
caption { max-width: calc(100vw - 2rem); }
summary { color: var(--link); cursor: pointer; padding: .25rem 0; }
.verdict { border-left: 4px solid var(--soft); padding: .1rem 0 .1rem 1rem; margin: 1rem 0; }
.verdict p { margin: .5rem 0; }
.verdict strong { font-size: 1.25rem; }
.dead { border-color: var(--dead); }
.dead strong { color: var(--dead); }
.alive { border-color: var(--alive); }
.alive strong { color: var(--alive); }
.verdict pre { font: .875rem/1.6 ui-monospace, monospace; white-space: pre-wrap; margin: .25rem 0 .5rem; }
.verdict ins { color: var(--alive); text-decoration: none; }
.verdict del { color: var(--dead); text-decoration: none; }
figure { margin: 1.5rem 0; }
figure svg { display: block; width: 100%; height: auto; max-width: var(--width); min-width: calc(.8 * var(--width)); }
figure svg { fill: currentColor; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
.beside > .wide { margin-bottom: 1.5rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem 1.5rem; }
.panels figure { margin: 0; min-width: 0; }
.panels figure svg { min-width: 0; }
.panels figcaption { font-weight: 600; padding: 0 0 .25rem; }
@media (min-width: 64rem) {
  figure svg { min-width: 0; }
  .beside { display: grid; grid-template-columns: minmax(0, 1fr) max-content; gap: 2rem; align-items: start; }
  .beside > .wide { order: 1; position: sticky; top: 1rem; }
}
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --soft: #aaa; --link: #7cc0f4; --shade: rgb(255 255 255 / .35); }
  :root { --dead: #ff8a80; --alive: #7ee787; }
}
@media print {
  :root { color-scheme: light; --line: #d4d4d4; --soft: #666; --link: inherit; --dead: #b3261e; --alive: #1a7f37; }
  body { max-width: none; padding: 0; }
  nav { display: none; }
  .wide { overflow: visible; background: none; }
  figure, tr { break-inside: avoid; }
  figure svg { min-width: 0; }
  h2 { break-after: avoid; }
  table { font-size: 8pt; max-width: 100%; }
  details::details-content { content-visibility: visible; }
}
"""
