"""`capo report`: one page about a run, or about a benchmark's results, that leads with what became of them."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from capo_rl.pages.doctor import diagnose
from capo_rl.pages.drawing import html_figure, html_id
from capo_rl.pages.page import Named, ReportError, Section, html_page, html_table
from capo_rl.pages.run_log import DoctorError, read_log
from capo_rl.pages.words import named, shown
from capo_rl.runs.plots import PANELS, draw_panels
from capo_rl.runs.records import Metrics, read_metrics, summarize
from capo_rl.statistics import mean_and_error, smooth

_SHARES = {"rejection_rate", "rejection_rate_positive", "rejection_rate_negative", "missing_mass"}


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
    """One run: what became of it, its summary beside its curves, its settings and versions."""
    record, entries = _read(folder / "run.json", "settings", "versions"), read_metrics(folder)
    over = (folder / "summary.json").is_file()
    summary = _read(folder / "summary.json") if over else summarize(entries)
    collapsed, verdict = _verdict(folder)
    curves = f'<div class="beside">{_summary(summary, record)}<div>{_curves(entries, collapsed)}</div></div>\n'
    settings = record["settings"]
    return html_page(
        f"Run {folder.resolve().name}",
        f"1 run of capo train: {entries[-1]['step']} steps{'' if over else ' so far, and not over'}.",
        Section("figures", "Summary and curves", curves),
        Section("settings", "Settings", _values("setting", [settings]), folded=f"{len(settings)} that were set"),
        Section("versions", "Versions", _values("library", [record["versions"]]), folded="Libraries and Python"),
        lead=verdict,
    )


def _verdict(folder: Path) -> tuple[int | None, str]:
    """The step at which a run collapsed, where that can be told, and what `capo doctor` says of it, as HTML."""
    try:
        diagnosis = diagnose(read_log(folder))
    except DoctorError as error:
        reason = str(error).removeprefix(f"{folder / 'metrics.jsonl'}: ")
        return None, _lead("unknown", [f"NOT KNOWN whether it lives: {reason}."])
    became = "alive" if diagnosis.collapsed is None else "dead"
    return diagnosis.collapsed, _lead(became, diagnosis.sentences, diagnosis.diff())


def _lead(became: str, sentences: Sequence[str], diff: Sequence[str] = ()) -> str:
    """A verdict as a page leads with it: the first words are set apart, and of a diff what goes and what comes."""
    capitals, rest = re.fullmatch(r"((?:[A-Z]+ )*[A-Z]+)(.*)", sentences[0], re.DOTALL).groups()  # type: ignore[union-attr]
    body = f"<p><strong>{capitals}</strong>{escape(rest)}</p>\n"
    body += "".join(f"<p>{escape(sentence)}</p>\n" for sentence in sentences[1:])
    if diff:
        tags = [("del" if line.startswith("-") else "ins", escape(line)) for line in diff]
        body += f"<p>Try:</p>\n<pre>{chr(10).join(f'<{tag}>{line}</{tag}>' for tag, line in tags)}</pre>\n"
    return f'<div class="verdict {became}" id="verdict">\n{body}</div>\n'


def _summary(summary: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """What a run came to, as a reader wants it."""
    rows: list[tuple[Named, Any]] = []
    for name, value in summary.items():
        if name in record:
            continue
        for part, each in value.items() if isinstance(value, Mapping) else [("", value)]:
            rows.append((named(f"{name}.{part}" if part else name), _as_said(name, each)))
    return html_table(("over the run", ""), rows)


def _as_said(name: str, value: Any) -> Any:
    if not isinstance(value, int | float):
        return shown(name, value)
    return f"{value:.1%}" if name in _SHARES else f"{value:,.1f} s" if name.startswith("seconds") else value


def _curves(entries: Metrics, collapsed: int | None) -> str:
    """The curves of a run; the same run gives the same bytes."""
    from matplotlib import rc_context

    with tempfile.TemporaryDirectory() as scratch, rc_context({"svg.hashsalt": "capo"}):
        drawn = draw_panels(entries, Path(scratch), collapsed)
        panels = "".join(html_figure(path, Named(PANELS[name]["title"], name)) for name, path in drawn.items())
    note = "Against the completions generated so far."
    if collapsed is not None:
        note += f" The dashed line is step {collapsed}, at which it collapsed."
    return f'<div class="panels">{panels}</div>\n<p class="note">{note}</p>\n'


def _results_page(folder: Path) -> str:
    """A benchmark: how many of its runs collapsed, its figures and tables, each arm with what sets it apart, and what
    all runs have in common."""
    runs = _read_runs(folder)
    bench, settings = runs[0]["bench"], [run["settings"] for run in runs]
    arms = {run["arm"]: [other for other in runs if other["arm"] == run["arm"]] for run in runs}
    names = dict.fromkeys(name for each in settings for name in each if name != "seed")
    apart = [name for name in names if len(_distinct(settings, name)) > 1]
    rows = [
        [arm, ", ".join(_distinct(its, "seed")), _mean_and_error([_last_reward(run) for run in its]), _deaths(its)]
        + [", ".join(_distinct([run["settings"] for run in its], name)) for name in apart]
        for arm, its in arms.items()
    ]
    columns: list[str | Named] = ["arm", "seeds", "reward", "collapsed", *[named(name) for name in apart]]
    note = "Reward: smoothed, at the last step; mean ± standard error over seeds. Collapsed: as capo doctor has it."
    figures = [(html_id(path.stem), html_figure(path)) for path in _in_order(folder.glob("figures/*.svg"))]
    tables = [_read_table(path) for path in _in_order(folder.glob("tables/*.json"))]
    common = _values("setting", settings, [n for n in names if n not in apart])
    versions = _values("name", [run["versions"] | {"hardware": run["hardware"]} for run in runs])
    return html_page(
        f"Results of {bench}",
        f"Runs of capo bench {bench}: {len(runs)}, in {len(arms)} arms.",
        Section("figures", "Figures", "".join(body for _, body in figures), [name for name, _ in figures]),
        Section("tables", "Tables", "".join(body for _, body in tables), [name for name, _ in tables]),
        Section("arms", "Arms", html_table(columns, rows, note=note)),
        Section("settings", "Settings of all runs", common, folded=f"{len(names) - len(apart)} that no arm has alone"),
        Section("versions", "Versions and hardware", versions, folded="Libraries, Python and the machine"),
        lead=_lead_of_results(arms),
    )


def _lead_of_results(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """How many of a benchmark's runs collapsed, and in how many arms."""
    told = {arm: [run["collapsed"] for run in its if run["collapsed"] is not None] for arm, its in arms.items()}
    known = [died for each in told.values() for died in each]
    if not known:
        return _lead(
            "unknown", ["NOT KNOWN of any run whether it collapsed: that takes eleven logged rewards or more."]
        )
    dead = sum(known)
    first = f"COLLAPSED: {dead} of {len(known)} runs" if dead else f"ALIVE: all {len(known)} runs"
    return _lead("dead" if dead else "alive", [f"{first}, in {sum(map(any, told.values()))} of {len(arms)} arms."])


def _deaths(runs: Sequence[Mapping[str, Any]]) -> str:
    told = [run["collapsed"] for run in runs if run["collapsed"] is not None]
    return f"{sum(told)} of {len(told)}" if told else "–"


def _collapsed(path: Path) -> bool | None:
    """Whether a run collapsed, None where that can't be told."""
    try:
        return diagnose(read_log(path)).collapsed is not None
    except DoctorError:
        return None


def _read_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs of a benchmark, every ARM/SEED.json, in the order of their names."""
    paths = _in_order(path for path in folder.glob("*/*.json") if path.parent.name not in ("figures", "tables"))
    if not paths:
        raise ReportError(
            f"{folder}: neither a run (run.json) nor results (ARM/SEED.json); give the output_dir of `capo train` or "
            "the folder of one benchmark, as results/main"
        )
    keys = ("bench", "arm", "seed", "settings", "versions", "hardware", "curves")
    return [_read(path, *keys) | {"collapsed": _collapsed(path)} for path in paths]


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
    return list(dict.fromkeys(shown(name, record.get(name)) for record in records))


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


def _read_table(path: Path) -> tuple[str, str]:
    """The id of a table and its HTML."""
    table = _read(path, "name", "title", "columns", "rows")
    name = html_id(table["name"])
    caption = f"<caption><b>{escape(table['name'])}</b> {escape(table['title'])}</caption>"
    return name, html_table(table["columns"], table["rows"], name, caption, table.get("note") or "")


def _values(kind: str, records: Sequence[Mapping[str, Any]], names: Iterable[str] | None = None) -> str:
    """A table of what records say, by name: one value where they agree, and all of them where they don't."""
    names = dict.fromkeys(name for record in records for name in record) if names is None else names
    return html_table((kind, "value"), [(named(name), ", ".join(_distinct(records, name))) for name in names])
