"""One HTML page about a run, or about a benchmark's results, that needs nothing beside it: no network and no script.

What a folder holds is not trusted. Text is escaped, of an SVG only what matplotlib draws gets in, and the page's own
policy forbids a browser to load or to run anything.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from capo_rl.runs.plots import draw_run
from capo_rl.runs.records import Metrics, read_metrics, summarize
from capo_rl.statistics import mean_and_error, smooth

_SVG = "{http://www.w3.org/2000/svg}"
_DRAWN = {_SVG + name for name in ("svg", "g", "defs", "clipPath", "path", "rect", "use", "image", "text", "tspan")}
_LEFT_OUT = {_SVG + name for name in ("metadata", "style", "title")}


class ReportError(ValueError):
    """A folder or file that can't be reported on; the message names the reason and the fix."""


class Section(NamedTuple):
    """A heading and what is below it, in HTML; `parts` are ids in there that the table of contents lists."""

    id: str
    title: str
    body: str
    parts: Iterable[str] = ()


def write_report(folder: str | Path, out: str | Path) -> Path:
    """Write one HTML page about the folder of a run of `capo train`, or of a benchmark of `capo bench`.

    Raises `ReportError` for a folder that is neither, and for a file in it that can't be shown.
    """
    folder, out = Path(folder), Path(out)
    page = _run_page(folder) if (folder / "run.json").is_file() else _results_page(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def _run_page(folder: Path) -> str:
    """One run: its curves, what it came to, its settings and versions."""
    record, entries = _read(folder / "run.json", "settings", "versions"), read_metrics(folder)
    over = (folder / "summary.json").is_file()
    summary = _read(folder / "summary.json") if over else summarize(entries)
    rows = [(name, value) for name, value in summary.items() if name not in record]
    return html_page(
        f"Run {folder.resolve().name}",
        f"1 run of capo train: {entries[-1]['step']} steps{'' if over else ' so far, and not over'}.",
        Section("figures", "Curves", _curves(entries)),
        Section("summary", "Summary", html_table(("metric", "value"), rows)),
        Section("settings", "Settings", _values("setting", [record["settings"]])),
        Section("versions", "Versions", _values("library", [record["versions"]])),
    )


def _results_page(folder: Path) -> str:
    """A benchmark: its figures and tables, each arm with what sets it apart, and what all runs have in common."""
    runs = _read_runs(folder)
    bench, settings = runs[0]["bench"], [run["settings"] for run in runs]
    arms = {run["arm"]: [other for other in runs if other["arm"] == run["arm"]] for run in runs}
    names = dict.fromkeys(name for each in settings for name in each if name != "seed")
    apart = [name for name in names if len(_distinct(settings, name)) > 1]
    rows = [
        [arm, ", ".join(_distinct(its, "seed")), _mean_and_error([_last_reward(run) for run in its])]
        + [", ".join(_distinct([run["settings"] for run in its], name)) for name in apart]
        for arm, its in arms.items()
    ]
    note = "Reward: smoothed, at the last step; mean ± standard error over seeds."
    figures = [(_id(path.stem), _figure(path)) for path in _in_order(folder.glob("figures/*.svg"))]
    tables = [_read_table(path) for path in _in_order(folder.glob("tables/*.json"))]
    return html_page(
        f"Results of {bench}",
        f"Runs of capo bench {bench}: {len(runs)}, in {len(arms)} arms.",
        Section("figures", "Figures", "".join(body for _, body in figures), [name for name, _ in figures]),
        Section("tables", "Tables", "".join(body for _, body in tables), [name for name, _ in tables]),
        Section("arms", "Arms", html_table(("arm", "seeds", "reward", *apart), rows, note=note)),
        Section("settings", "Settings of all runs", _values("setting", settings, [n for n in names if n not in apart])),
        Section(
            "versions",
            "Versions and hardware",
            _values("name", [run["versions"] | {"hardware": run["hardware"]} for run in runs]),
        ),
    )


def _read_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs of a benchmark, every ARM/SEED.json, in the order of their names."""
    paths = _in_order(path for path in folder.glob("*/*.json") if path.parent.name not in ("figures", "tables"))
    if not paths:
        raise ReportError(
            f"{folder}: neither a run (run.json) nor results (ARM/SEED.json); give the output_dir of `capo train` or "
            "the folder of one benchmark, as results/main"
        )
    return [_read(path, "bench", "arm", "seed", "settings", "versions", "hardware", "curves") for path in paths]


def _read(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object that has these keys."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: can't be read as JSON ({error}); make it again, or move it elsewhere") from None
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        raise ReportError(f"{path}: should have {', '.join(keys)}; make it again, or move it elsewhere")
    return content


def _in_order(paths: Iterable[Path]) -> list[Path]:
    """Paths by name, with fig2 before fig10."""
    return sorted(paths, key=lambda path: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", str(path))])


def _distinct(records: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """The different values that records have of something, exactly as they were set; a dash where there is none."""
    return list(dict.fromkeys(_exact(record.get(name)) for record in records))


def _exact(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def _last_reward(run: Mapping[str, Any]) -> float:
    return float(smooth(run["curves"]["reward"])[-1]) if run["curves"].get("reward") else math.nan


def _mean_and_error(values: Sequence[float]) -> str:
    """The mean over seeds and its standard error, and of how many where some are NaN.

    >>> _mean_and_error([0.5, 0.7]), _mean_and_error([0.5, math.nan]), _mean_and_error([math.nan])
    ('0.600 ± 0.100', '0.500 (1 of 2)', '–')
    """
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "–"
    mean, error = mean_and_error(known)
    some = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{mean:.3f}{f' ± {error:.3f}' if len(known) > 1 else ''}{some}"


def _curves(entries: Metrics) -> str:
    """The curves of a run; the same run gives the same bytes."""
    from matplotlib import rc_context

    with tempfile.TemporaryDirectory() as scratch, rc_context({"svg.hashsalt": "capo"}):
        path = Path(scratch) / "curves.svg"
        draw_run(entries, path, title="")
        return _figure(path, title="against the completions generated so far")


def _figure(path: Path, title: str = "") -> str:
    """A drawing of matplotlib's as a part of the page, with its own or another title below it."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ReportError(f"{path}: not an SVG ({error}); draw it again") from None
    name, title = _id(path.stem), title or root.findtext(f"{_SVG}title", default="")
    drawing = _drawing(root, name, path)
    drawing.attrib |= {"role": "img", "aria-label": title or name, "style": f"--width: {root.get('width', '100%')}"}
    svg = ElementTree.tostring(drawing, encoding="unicode")
    caption = f"<figcaption><b>{escape(path.stem)}</b> {escape(title)}</figcaption>"
    return f'<figure id="{name}"><div class="wide">{svg}</div>{caption}</figure>\n'


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
        copy.set(key, f"{name}-{value}" if key == "id" else re.sub(pointer, f"#{name}-", value))
    copy.extend([_drawing(child, name, path) for child in element if child.tag not in _LEFT_OUT])
    return copy


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _id(name: str) -> str:
    return re.sub(r"[^\w-]+", "-", name)


def _read_table(path: Path) -> tuple[str, str]:
    """The id of a table and its HTML."""
    table = _read(path, "name", "title", "columns", "rows")
    name = _id(table["name"])
    caption = f"<caption><b>{escape(table['name'])}</b> {escape(table['title'])}</caption>"
    return name, html_table(table["columns"], table["rows"], name, caption, table.get("note") or "")


def _values(kind: str, records: Sequence[Mapping[str, Any]], names: Iterable[str] | None = None) -> str:
    """A table of what records say, by name: one value where they agree, and all of them where they don't."""
    names = dict.fromkeys(name for record in records for name in record) if names is None else names
    return html_table((kind, "value"), [(name, ", ".join(_distinct(records, name))) for name in names])


def html_table(
    columns: Iterable[str], rows: Iterable[Iterable[Any]], name: str = "", caption: str = "", note: str = ""
) -> str:
    """A table in a frame that scrolls where the screen is narrow."""
    head = "".join(f'<th scope="col">{escape(str(column))}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(_cell(cell))}</td>' for cell in row)}</tr>\n" for row in rows)
    start = f'<table id="{name}">' if name else "<table>"
    table = f"{start}{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    below = f'<p class="note">{escape(note)}</p>\n' if note else ""
    return f'<div class="wide">{table}</div>\n{below}'


def _cell(value: Any) -> str:
    """A value as a reader wants it; a mean and its error stay on one line.

    >>> [_cell(value) for value in (None, True, 208097.0, 0.0123456, "0.5 ± 0.1")]
    ['–', 'true', '208,097', '0.01235', '0.5\\xa0±\\xa00.1']
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _exact(value).replace(" ± ", "\xa0±\xa0")
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def html_page(title: str, about: str, *sections: Section, style: str = "") -> str:
    """The whole page, with the sections that have something to show; `style` is added to the report's own."""
    shown = [section for section in sections if section.body]
    ids = [name for section in shown for name in (section.id, *section.parts)]
    if twice := {name for name in ids if ids.count(name) > 1}:
        raise ReportError(f"two parts of the report are called {', '.join(twice)}; rename the figure or the table")
    contents = body = ""
    for section in shown:
        parts = " ".join(f'<a href="#{name}">{name}</a>' for name in section.parts)
        contents += f'<li><a href="#{section.id}">{section.title}</a> {parts}</li>\n'
        body += f'<section>\n<h2 id="{section.id}">{section.title}</h2>\n{section.body}</section>\n'
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
<p>{escape(about)}</p>
<nav aria-label="Contents"><ul>
{contents}</ul></nav>
{body}</body>
</html>
"""


_STYLE = """
:root { color-scheme: light dark; --line: #d4d4d4; --soft: #666; --link: #0060a0; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
a { color: var(--link); }
nav ul { padding: 0; list-style: none; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: max-content; max-width: 62rem; overflow-wrap: normal; }
table { font-size: .875rem; font-variant-numeric: tabular-nums; }
caption, figcaption { padding: .5rem 0; text-align: left; font-size: .875rem; }
th, td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
.note { color: var(--soft); font-size: .875rem; }
caption { max-width: calc(100vw - 2rem); }
figure { margin: 1.5rem 0; }
figure .wide { background: #fff; border-radius: 4px; padding: .5rem; }
figure svg { display: block; width: 100%; height: auto; max-width: var(--width); min-width: calc(.6 * var(--width)); }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
@media (min-width: 64rem) { figure svg { min-width: 0; } }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #aaa; --link: #7cc0f4; } }
@media print {
  :root { color-scheme: light; --line: #d4d4d4; --soft: #666; --link: inherit; }
  body { max-width: none; padding: 0; }
  nav { display: none; }
  .wide { overflow: visible; }
  figure, tr { break-inside: avoid; }
  figure svg { min-width: 0; }
  h2 { break-after: avoid; }
  table { font-size: 8pt; max-width: 100%; }
}
"""
