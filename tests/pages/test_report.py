"""The report: all that a folder has is in one page, nothing of it runs, and a browser shows it at any width."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure

from capo_rl.cli import main
from capo_rl.pages.report import ReportError, write_report
from capo_rl.runs.records import RunFolderError, start_run, summarize, write_json, write_metrics
from chromium import browser, needs_browser

HOSTILE = "<script>alert('x')</script>"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that is over, with one hostile setting."""
    folder = tmp_path / "runs" / "a&b"
    entries = [
        {"step": i, "reward": 0.1 * i, "grad_norm": 1.0, "capo/completions": 16 * i, "capo/kl/measured": 1e-3 / i}
        for i in range(1, 9)
    ]
    start_run(folder, {"learning_rate": 0.00012345678, "model_name_or_path": HOSTILE, "debug": []})
    write_metrics(folder / "metrics.jsonl", entries)
    write_json(folder / "summary.json", summarize(entries) | {"settings": {}, "versions": {}})
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A benchmark: two arms, three runs, two figures with the same ids in them, a table too wide for any screen."""
    folder = tmp_path / "results" / "testbed"
    for arm, slug, seed, reward, own in (
        ("GRPO (A)", "grpo-a", 11, 0.5, {"capo_mode": "off"}),
        ("GRPO (A)", "grpo-a", 9, 0.7, {"capo_mode": "off"}),
        (f"CAPO {HOSTILE}", "capo", 9, 0.9, {"capo_mode": "mask", "capo_fisher_threshold": 1e-4}),
    ):
        write_json_at(
            folder / slug / f"{seed}.json",
            {
                "bench": "testbed",
                "arm": arm,
                "seed": seed,
                "settings": {"learning_rate": 0.001, "seed": seed} | own,
                "versions": {"python": "3.11.7", "torch": "2.13.0" if seed == 9 else "2.12.0"},
                "hardware": "x86_64, 2 cores",
                "curves": {"step": [1, 2, 3], "reward": [reward, None, reward], "capo/completions": [16, 32, 48]},
                "test": {"capo/completions": [48], "accuracy": [reward]},
                "seconds": {"total": 41.2},
            },
        )
    for name in ("fig10", "fig2"):
        draw(folder / "figures" / f"{name}.svg", f"Reward of {name} & co")
    columns = ["arm", *(f"threshold {i}" for i in range(12))]
    rows = [["GRPO (A)", *[None] * 12], [HOSTILE, *(0.123456 + i for i in range(12))]]
    table = {"name": "table5", "title": "Rejections", "columns": columns, "rows": rows, "note": "Means & errors."}
    write_json_at(folder / "tables" / "table5.json", table)
    return folder


def write_json_at(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def draw(path: Path, title: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    axes.plot([0, 1, 2], [0.2, 0.8, 0.5])
    axes.imshow([[0, 1], [1, 0]])  # a bitmap, which the file holds within itself
    with rc_context({"svg.hashsalt": "the same in every file"}):
        figure.savefig(path, metadata={"Title": title})


def row(field: str, words: str, value: str) -> str:
    """The start of a table's row: words, their field in a hover if it is another, and a value."""
    cell = words if words == field else f'<abbr title="{field}">{words}</abbr>'
    return f"<td>{cell}</td><td>{value}"


def test_a_run_is_shown_whole(run, tmp_path):
    page = write_report(run, tmp_path / "deep" / "report.html").read_text()
    assert "<h1>Run a&amp;b</h1>" in page and "1 run of capo train: 8 steps." in page
    assert re.findall(r'<figure id="(.*?)"><figcaption><abbr title="(.*?)">', page) == [
        ("reward", "reward"),
        ("capo-kl-measured", "capo/kl/measured"),
        ("grad_norm", "grad_norm"),
    ]
    assert row("reward_best", "reward, best tenth", "0.8") in page
    assert row("completions", "completions generated", "128") in page
    assert row("learning_rate", "learning rate", "0.00012345678") in page and row("python", "python", "") in page
    assert HOSTILE not in page and "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in page
    assert write_report(run, tmp_path / "again.html").read_text() == page


def test_a_run_that_is_not_over_is_summed_up_so_far(run, tmp_path):
    (run / "summary.json").unlink()
    page = write_report(run, tmp_path / "report.html").read_text()
    assert "8 steps so far, and not over." in page and row("completions", "completions generated", "128") in page
    write_metrics(run / "metrics.jsonl", [])
    with pytest.raises(RunFolderError, match="no training step is logged"):
        write_report(run, tmp_path / "report.html")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(RunFolderError, match="no such file"):
        write_report(run, tmp_path / "report.html")


def dying(steps: int) -> list[float]:
    return [0.8] * 20 + [0.0] * (steps - 20)


@pytest.mark.parametrize("mode", ["monitor", "trust_region"])
def test_a_run_leads_with_what_the_doctor_says(run, tmp_path, mode, capsys):
    entries = [
        {"step": i, "reward": reward, "capo/completions": 16 * i, "capo/kl/measured": 0.1, "entropy": 1.0}
        for i, reward in enumerate(dying(40), 1)
    ]
    write_metrics(run / "metrics.jsonl", entries)
    start_run(run, {"capo_mode": mode})
    page = write_report(run, tmp_path / "report.html").read_text()
    assert main(["doctor", str(run)]) == 1
    _, *told = capsys.readouterr().out.splitlines()
    body = page[page.index("<h1>") :]
    lead = body[body.index("</h1>") : body.index("<nav")]
    # all of it, in its words, before anything else
    assert unescape(re.sub("<[^>]*>", "", lead)).split()[: len(" ".join(told).split())] == " ".join(told).split()
    assert '<div class="verdict dead"' in lead and "<strong>COLLAPSED</strong> at step 26" in lead
    assert f"<del>-capo_mode: {mode}</del>" in lead or mode == "trust_region"
    assert "The dashed line is step 26, at which it collapsed." in page
    write_metrics(run / "metrics.jsonl", [entry | {"reward": 0.8} for entry in entries])
    page = write_report(run, tmp_path / "report.html").read_text()
    assert '<div class="verdict alive" id="verdict">\n<p><strong>ALIVE</strong> (40 logged steps' in page
    assert "dashed" not in page


def test_of_a_short_run_the_reason_stands_in_the_verdict_s_place(run, tmp_path):
    page = write_report(run, tmp_path / "report.html").read_text()
    assert "<strong>NOT KNOWN</strong> whether it lives: 8 logged steps with a reward, and a collapse shows in" in page
    assert str(run) not in page


def test_results_lead_with_how_many_runs_collapsed(results, tmp_path):
    for path, reward in ((results / "grpo-a" / "9.json", dying(40)), (results / "capo" / "9.json", [0.8] * 40)):
        result = json.loads(path.read_text())
        result["curves"] = {"step": list(range(1, 41)), "reward": reward}
        write_json(path, result)
    page = write_report(results, tmp_path / "report.html").read_text()
    assert "<strong>COLLAPSED</strong>: 1 of 2 runs, in 1 of 2 arms." in page
    assert "<td>1 of 1</td><td>off</td>" in page and "<td>0 of 1</td><td>mask</td>" in page


def test_settings_and_versions_are_folded(run, results, tmp_path):
    for folder in (run, results):
        page = write_report(folder, tmp_path / "report.html").read_text()
        for part in ("settings", "versions"):
            after = page[page.index(f'<h2 id="{part}">') :].partition("</h2>\n")[2]
            assert after.startswith("<details><summary>") and "<table>" in after[: after.index("</details>")]


SECRET = "s3cr3tvalue99"


def test_secrets_are_never_shown(run, results, tmp_path):
    secret: dict[str, Any] = {
        "hub_token": SECRET,
        "WANDB_API_KEY": SECRET,
        "model_init_kwargs": {"token": SECRET, "headers": {"Authorization": SECRET}, "layers": [{"password": SECRET}]},
        "dataset_name": f"https://me:{SECRET}@example.org/data?api_key={SECRET}&split=train",
        "report_to": [f"hf_{SECRET}", f"Bearer {SECRET}"],
        "vllm_extra": f'{{"api_key": "{SECRET}", "n": 1}}',
    }
    harmless = {"capo_tokens_every": 10, "max_tokens": 99, "key_bias": True, "loss_type": "token-level"}
    start_run(run, secret | harmless)
    page = write_report(run, tmp_path / "report.html").read_text()
    assert SECRET not in page and page.count("(not shown)") == 10
    assert row("hub_token", "hub token", "(not shown)</td>") in page
    assert "https://(not shown)@example.org/data?(not shown)&amp;split=train" in page
    for name, value in harmless.items():
        assert f'title="{name}"' in page and f"<td>{json.dumps(value).strip(chr(34))}</td>" in page
    path = results / "capo" / "9.json"
    result = json.loads(path.read_text())
    result["settings"] |= secret
    write_json(path, result)
    assert SECRET not in write_report(results, tmp_path / "report.html").read_text()


def test_results_say_what_sets_arms_apart_and_the_rest_once(results, tmp_path):
    page = write_report(results, tmp_path / "report.html").read_text()
    assert "Runs of capo bench testbed: 3, in 2 arms." in page
    assert "<strong>NOT KNOWN</strong> of any run whether it collapsed" in page
    arms = page[page.index('<h2 id="arms">') : page.index('<h2 id="settings">')]
    assert re.findall(r'<th scope="col">(.*?)</th>', arms) == [
        "arm",
        "seeds",
        "reward",
        "collapsed",
        '<abbr title="capo_mode">mode</abbr>',
        '<abbr title="capo_fisher_threshold">bound on m_F</abbr>',
    ]
    assert "<td>GRPO (A)</td><td>9, 11</td><td>0.600\xa0±\xa00.100</td><td>–</td><td>off</td><td>–</td>" in arms
    assert "</td><td>9</td><td>0.900</td><td>–</td><td>mask</td><td>0.0001</td>" in arms
    assert page.count(row("learning_rate", "learning rate", "0.001</td>")) == 1
    assert row("torch", "torch", "2.13.0, 2.12.0") in page and row("hardware", "hardware", "x86_64, 2 cores") in page
    assert HOSTILE not in page


def test_every_figure_and_table_is_there_in_order_and_its_ids_are_its_own(results, tmp_path):
    page = write_report(results, tmp_path / "report.html").read_text()
    assert re.findall(r"<(?:figure|table) id=\"(.*?)\"", page) == ["fig2", "fig10", "table5"]
    assert "<figcaption><b>fig2</b> Reward of fig2 &amp; co</figcaption>" in page
    assert "<caption><b>table5</b> Rejections</caption>" in page and "Means &amp; errors." in page
    ids = re.findall(r'\bid="(.*?)"', page)
    assert len(ids) == len(set(ids)) > 50
    pointers = re.findall(r'href="#(.*?)"|url\(#(.*?)\)', page)
    assert {link or clip for link, clip in pointers} <= set(ids)
    assert any(clip.startswith("fig2-") for _, clip in pointers)
    # nothing is left of what belongs to a file, or would hold for the whole page
    assert page.count("<style") == 1 and not re.search(r"<\?xml|<!DOCTYPE svg|<metadata|xmlns|ns0:", page)


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        '<h:script xmlns:h="http://www.w3.org/1999/xhtml">alert(1)</h:script>',
        "<foreignObject/>",
        '<g onload="alert(1)"/>',
        '<g OnClick="alert(1)"/>',
        '<use xlink:href="https://example.org/a.svg#b"/>',
        '<use xlink:href="javascript:alert(1)"/>',
        '<image href="//example.org/a.png"/>',
        '<image href="data:image/svg+xml;base64,AAAA"/>',
        '<rect style="fill: url( https://example.org/a.svg#b)"/>',
        "<g>",
    ],
)
def test_an_svg_that_could_run_or_fetch_anything_is_refused(results, tmp_path, hostile):
    path = results / "figures" / "fig2.svg"
    path.write_text(path.read_text().replace("</svg>", hostile + "</svg>"))
    with pytest.raises(ReportError, match=r"fig2\.svg: .*draw it again"):
        write_report(results, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_what_is_wrong_with_a_folder_is_said(results, tmp_path):
    def refused(message: str, folder: Path = results) -> None:
        with pytest.raises(ReportError, match=message):
            write_report(folder, tmp_path / "report.html")

    refused("neither a run .* nor results .*; give the output_dir", tmp_path / "elsewhere")
    refused("neither a run", results.parent.parent)
    write_json_at(results / "tables" / "copy.json", json.loads((results / "tables" / "table5.json").read_text()))
    refused("two parts of the report are called table5")
    (results / "tables" / "copy.json").write_text('{"name": "table6"}')
    refused("copy.json: should have name, title, columns, rows")
    (results / "capo" / "12.json").write_text('{"bench"')
    refused("12.json: can't be read as JSON")


@needs_browser
def test_a_browser_shows_the_page_and_asks_for_nothing_else(run, results, tmp_path):
    shown = {
        write_report(run, tmp_path / "run.html").as_uri(): ["#reward", "#grad_norm"],
        write_report(results, tmp_path / "results.html").as_uri(): ["#fig2", "#fig10", "#table5"],
    }
    with browser(tmp_path / "profile") as chromium:
        for address, parts in shown.items():
            for pixels in (1280, 390):
                chromium.width(pixels)
                chromium("POST", "/url", url=address)
                for part in parts:
                    frame = f"const part = document.querySelector('{part}'); return (part.closest('.wide') || part)"
                    box = chromium.run(f"{frame}.getBoundingClientRect().toJSON()")
                    assert box["height"] > 50 and 0 <= box["left"] < box["right"] <= pixels, (part, box)
                assert chromium.run("return document.documentElement.scrollWidth") <= pixels
                assert chromium.run("return document.querySelectorAll('script').length") == 0
        assert {url for url in chromium.asked() if not url.startswith("data:")} == shown.keys()
        assert chromium.log("browser") == []


@needs_browser
def test_a_browser_has_the_summary_beside_the_curves_and_a_phone_has_whole_panels(run, tmp_path):
    address = write_report(run, tmp_path / "run.html").as_uri()
    with browser(tmp_path / "profile") as chromium:

        def box(part: str) -> dict[str, float]:
            return chromium.run(f"return document.querySelector('{part}').getBoundingClientRect().toJSON()")

        chromium.width(1280)
        chromium("POST", "/url", url=address)
        assert box(".beside table")["left"] > box(".panels")["right"]
        assert abs(box(".beside > .wide")["top"] - box(".panels")["top"]) < 20
        assert box("#verdict")["bottom"] < box("nav")["top"]
        unfolded = "return document.querySelector('#settings + details table').checkVisibility()"
        assert not chromium.run(unfolded)
        chromium.run("document.querySelector('#settings + details summary').click()")
        assert chromium.run(unfolded)
        chromium.width(390)
        chromium("POST", "/url", url=address)
        assert box(".beside table")["bottom"] < box(".panels")["top"]
        # at its own size but for a fifth, and so are its letters
        drawn = chromium.run("return document.querySelector('#reward svg').viewBox.baseVal.width") * 4 / 3
        assert 390 >= box("#reward svg")["width"] > 0.8 * drawn
        assert box("#reward svg")["left"] < 30 and box("#grad_norm svg")["left"] < 30


@needs_browser
def test_a_browser_shows_that_a_table_scrolls(results, tmp_path):
    address = write_report(results, tmp_path / "results.html").as_uri()
    with browser(tmp_path / "profile") as chromium:
        for theme in ("light", "dark"):
            chromium.theme(theme)
            chromium.width(390)
            chromium("POST", "/url", url=address)
            frame = "document.querySelector('#table5').closest('.wide')"
            chromium.run(f"{frame}.scrollIntoView()")
            for scrolled, more in ((0, (False, True)), (200, (True, True)), (9999, (True, False))):
                chromium.run(f"{frame}.scrollLeft = {scrolled}")
                box = chromium.run(f"return {frame}.getBoundingClientRect().toJSON()")
                picture = chromium.picture()
                page = picture[2, 2]
                row = picture[int(box["top"]) + 1]
                edges = row[int(box["left"]) + 1], row[int(box["right"]) - 2]
                assert tuple(abs(edge - page).max() > 0.1 for edge in edges) == more, (theme, scrolled)


@needs_browser
def test_a_browser_has_drawings_in_the_theme_s_colours(run, tmp_path):
    address = write_report(run, tmp_path / "run.html").as_uri()
    with browser(tmp_path / "profile") as chromium:
        shades = {}
        for theme in ("light", "dark"):
            chromium.theme(theme)
            chromium.width(390)
            chromium("POST", "/url", url=address)
            chromium.run("document.querySelector('#reward').scrollIntoView()")
            box = chromium.run("return document.querySelector('#reward svg').getBoundingClientRect().toJSON()")
            picture = chromium.picture()[int(box["top"]) : int(box["bottom"]), int(box["left"]) : int(box["right"])]
            shades[theme] = picture.mean(), picture.min(), picture.max()
        assert shades["light"][0] > 0.9 and shades["light"][1] < 0.2  # black on white
        assert shades["dark"][0] < 0.2 and shades["dark"][2] > 0.8  # white on black
