"""The page about a step: hostile completions are text on it, every verdict has its reason, and a browser shows it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_tokens import some_tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from capo_rl.cli import main
from capo_rl.pages import explain
from capo_rl.pages.explain import ExplainError, write_explanation
from capo_rl.pages.token_text import token_texts
from capo_rl.runs.tokens import StepTokens, write_step
from chromium import browser, needs_browser

SCRIPT = "<script>document.title='owned'</script>"
WORDS = [
    "<unk>",
    SCRIPT,
    "</span></del></div></body>",
    '"onmouseover="document.title=1',
    "\x00\x1b[31m",
    "\u202egnihton",
    "&lt;\u200b&amp;",
    "\n",
    "prompt",
    "<img/src=x>",
    "x" * 500,
]
HOSTILE = list(range(1, len(WORDS)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose policy says hostile things, recorded at steps 4 and 8: each token once rejected, once kept."""
    folder = tmp_path / "a&b"
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    checkpoint = folder / "checkpoint-8"
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(checkpoint)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 8}')
    for step in (4, 8):
        write_step(folder, hostile_tokens(step))
    return folder


def hostile_tokens(step: int, **about) -> StepTokens:
    n = len(HOSTILE)
    keep = np.repeat([True, False], n)
    return some_tokens(
        completion=np.repeat(np.array([0, 1], "i4"), n),
        token=np.array(HOSTILE * 2, "i4"),
        advantage=np.repeat(np.array([1.5, -0.5], "f4"), n),
        m_f=np.concatenate([np.geomspace(1e-6, 0.1, n), np.geomspace(0.2, 50, n)]).astype("f4"),
        m_h=np.linspace(-0.5, 0.5, 2 * n, dtype="f4"),
        log_pi=np.full(2 * n, -0.25, "f4"),
        missing_mass=np.full(2 * n, 0.01, "f4"),
        keep=keep,
        prompt=np.array([[-1, 8], [1, 8]], "i4"),
        about={"step": step} | about,
    )


class Elements(HTMLParser):
    """The elements of a page, each with its attributes and the text right in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def of_step(page: str, step: int) -> str:
    """The part of a page about a step."""
    return page[page.index(f'<section class="step" id="step-{step}">') :].partition("</section>")[0]


def test_hostile_text_is_text(run, tmp_path):
    page = write_explanation(run, 4, tmp_path / "deep" / "explain.html").read_text()
    elements = Elements(page)
    assert {tag for tag, _ in elements.all}.isdisjoint({"script", "img", "iframe"})
    assert not [name for _, attributes in elements.all for name in attributes if name.startswith("on")]
    assert len(re.findall("</body>", page)) == 1
    # what a browser would obey or not show is spelled out, in the text, in the tables and in the tooltips
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]", page)
    for name in ("U+0000", "U+001B", "U+202E", "U+200B", "↵"):
        assert page.count(f"<i>{name}</i>") == 4 and page.count(name) > 10, name
    tips = [attributes["title"] for tag, attributes in elements.all if "title" in attributes]
    assert len(tips) == 2 * 2 * len(HOSTILE)
    assert any(SCRIPT in tip for tip in tips)
    assert SCRIPT in elements.text and "&lt;U+200B&amp;" in elements.text


def test_each_token_has_its_values_and_its_reason(run, tmp_path):
    page = write_explanation(run, None, tmp_path / "explain.html").read_text()
    assert "<title>Run a&amp;b: which tokens were rejected, and why</title>" in page
    page = of_step(page, 8)
    assert (
        "<p>10 of 20 (50.0%) tokens rejected; with A &gt; 0 0 of 10 (0.0%), with A &lt; 0 10 of 10 (100.0%).</p>"
        in page
    )
    elements = Elements(page)
    tips = {tag: [a["title"] for t, a in elements.all if t == tag and "title" in a] for tag in ("span", "del")}
    assert len(tips["span"]) == len(tips["del"]) == 10
    for tip in tips["span"]:
        assert tip.endswith("log π(a) -0.25\nA 1.5\nmissing mass 0.01\nkept")
    for tip in tips["del"]:
        assert tip.endswith("A -0.5\nmissing mass 0.01\nrejected: m_F > 0.1")
    assert "Completion 1 · A = 1.5 · reward 1 · 0 of 10 rejected" in page
    assert "Completion 2 · A = -0.5 · no reward · 10 of 10 rejected" in page
    assert "<td>tokens with m_F &gt; 0.1</td><td>10</td>" in page
    assert "<td>bounds on m_H</td><td>≥ -1</td>" in page
    # the colours: 3 at the bound, 6 more than a hundred times above it
    kept, out = ([int(a["class"][1]) for t, a in elements.all if t == tag and "title" in a] for tag in ("span", "del"))
    assert (min(kept), max(kept), min(out), max(out)) == (0, 3, 4, 6)


def test_the_tally_is_over_all_recorded_steps(run, tmp_path):
    page = unescape(write_explanation(run, 4, tmp_path / "explain.html").read_text())
    assert "Counted over 2 recorded steps, 4 to 8." in page
    tally = page[page.index("Most rejected tokens") : page.index('<section class="step"')]
    assert "<h3>A > 0</h3>\n<p>None was rejected.</p>" in tally
    assert "<td>prompt</td><td>2</td><td>2</td><td>100%</td>" in tally and tally.count("<tr><td>") == 10


def test_a_verdict_that_is_not_by_bounds_alone_says_so(run, tmp_path):
    write_step(run, hostile_tokens(9, judged="sequence", mode="monitor", fisher=None, low=None))
    page = write_explanation(run, 9, tmp_path / "explain.html").read_text()
    assert "Step 9, as asked for. No token was left out of the gradient: capo_mode is monitor." in page
    part = of_step(page, 9)
    assert "10 of 20 (50.0%) tokens would have been rejected" in part
    assert "rejected: judged by the mean of its sequence" in part
    assert "<td>bound on m_F</td><td>none</td>" in part
    write_step(run, some_tokens(about={"step": 10}))
    part = of_step(write_explanation(run, None, tmp_path / "explain.html").read_text(), 10)
    assert part.count("rejected: not finite") == part.count("rejected: m_H &lt; -1") == 1


def worse(step: int) -> StepTokens:
    """A step with twelve rejected tokens: two of the first completion, and all of the second."""
    tokens = hostile_tokens(step)
    return replace(tokens, keep=tokens.keep & ~np.isin(np.arange(20), [3, 7]))


def test_it_opens_on_the_step_with_the_most_rejections_and_links_to_the_others(run, tmp_path):
    write_step(run, worse(6))
    page = write_explanation(run, None, tmp_path / "explain.html").read_text()
    assert "Of the recorded steps, 6 has the most rejections." in page
    assert "body:not(:has(.step:target)) #step-6 { display: block; }" in page
    assert re.findall('<section class="step" id="step-(.*?)">', page) == ["4", "6", "8"]
    assert re.findall('href="#step-(.*?)"', of_step(page, 6)) == ["4", "8"]
    assert [re.findall('href="#step-(.*?)"', of_step(page, step)) for step in (4, 8)] == [["6"], ["6"]]
    rows = re.findall(r'<td><a href="#step-(\d+)">\1</a></td><td>(.*?)</td>', page)
    assert rows == [("4", "10 of 20 (50.0%)"), ("6", "12 of 20 (60.0%)"), ("8", "10 of 20 (50.0%)")]
    asked = write_explanation(run, 8, tmp_path / "explain.html").read_text()
    assert "Step 8, as asked for." in asked and "#step-8 { display: block; }" in asked
    for step in (4, 6, 8):
        write_step(run, replace(hostile_tokens(step), keep=np.ones(20, bool)))
    page = write_explanation(run, None, tmp_path / "explain.html").read_text()
    assert "In no recorded step a token is out of bounds; this is the last, 8." in page


def test_steps_that_a_page_has_no_room_for_are_named(run, tmp_path, monkeypatch):
    write_step(run, worse(6))
    monkeypatch.setattr(explain, "_ROOM", 59)
    page = write_explanation(run, 4, tmp_path / "explain.html").read_text()
    assert re.findall('<section class="step" id="step-(.*?)">', page) == ["4", "6"]
    assert "<tr><td>8</td><td>10 of 20" in page and "For a step without a link: capo explain RUN --step N." in page


def test_what_was_rejected_comes_first_and_each_prompt_has_its_numbers(run, tmp_path):
    part = of_step(write_explanation(run, 4, tmp_path / "explain.html").read_text(), 4)
    assert re.findall("<h3>(.*?)</h3>", part) == ["Prompt 2", "Prompt 1"]
    assert re.findall("Completion (.)", part) == ["2", "1"]
    assert '<p class="head">1 completion · no reward · 10 of 10 (100.0%) tokens rejected</p>' in part
    assert '<p class="head">1 completion · reward 1 on average · 0 of 10 (0.0%) tokens rejected</p>' in part
    write_step(run, replace(worse(4), prompt=np.array([[-1, 8], [-1, 8]], "i4")))
    part = of_step(write_explanation(run, 4, tmp_path / "explain.html").read_text(), 4)
    assert "2 completions · reward 1 on average (1 of 2 have one) · 12 of 20 (60.0%) tokens rejected" in part
    assert re.findall("Completion (.)", part) == ["2", "1"] and part.count("<h3>") == 1


def test_what_can_not_be_explained_is_said(run, tmp_path, capsys):
    out = tmp_path / "explain.html"
    with pytest.raises(ExplainError, match="step 5 was not recorded; the nearest that were: 4, 8"):
        write_explanation(run, 5, out)
    with pytest.raises(ExplainError, match="no tokens were recorded there; train with `--capo_tokens_every 10`"):
        write_explanation(tmp_path, None, out)
    (run / "checkpoint-8" / "tokenizer_config.json").unlink()
    with pytest.raises(ExplainError, match=r"no tokenizer to read its tokens with \(no checkpoint, and no run\.json"):
        write_explanation(run, 4, out)
    (run / "run.json").write_text(json.dumps({"settings": {"model_name_or_path": "./gone"}}))
    with pytest.raises(ExplainError, match=r"no tokenizer .*\./gone: no such folder"):
        write_explanation(run, 4, out)
    (run / "tokens" / "step-000008.safetensors").write_bytes(b"")
    assert main(["explain", str(run), "--out", str(out)]) == 2
    assert "step-000008.safetensors: not the tokens of a step" in capsys.readouterr().err
    assert not out.exists()


def test_without_a_checkpoint_the_model_s_own_tokenizer_is_read(run, tmp_path, capsys):
    (run / "checkpoint-8" / "trainer_state.json").unlink()
    (run / "run.json").write_text(json.dumps({"settings": {"model_name_or_path": "embedded"}}))
    assert main(["explain", str(run), "--step", "4", "--out", str(tmp_path / "explain.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'explain.html'}\n"


@pytest.mark.parametrize("text", ["né€😀", "😀😀", "a\nb", "日本", ""])
def test_a_character_of_several_tokens_is_the_last_one_s(text):
    tokenizer, ids = bytewise(text.encode())
    expected = [part for char in text for part in [""] * (len(char.encode()) - 1) + [char]]
    assert token_texts(tokenizer, ids) == expected


@pytest.mark.parametrize("broken", [b"\xff" * 9, "😀".encode()[:3], b"\xe2\x82abc", b"a\xf0\x9fb\xff", b"\xc3"])
def test_of_bytes_that_are_no_character_nothing_is_lost(broken):
    tokenizer, ids = bytewise(broken)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(broken) and "".join(texts) == tokenizer.decode(ids) and "�" in "".join(texts)


def bytewise(text: bytes) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """A tokenizer with one token a byte, and the tokens of some bytes."""
    # the alphabet of byte-level BPE: printable bytes as they are, the others from 256 on
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    tokens = Tokenizer(models.BPE({alphabet[byte]: byte for byte in range(256)}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens), list(text)


@needs_browser
def test_a_browser_shows_the_text_and_runs_nothing(run, tmp_path):
    address = write_explanation(run, 8, tmp_path / "explain.html").as_uri()
    with browser(tmp_path / "profile") as chromium:
        for pixels in (1280, 390):
            chromium.width(pixels)
            chromium("POST", "/url", url=address)
            assert chromium.run("return document.title") == "Run a&b: which tokens were rejected, and why"
            assert chromium.run("return document.querySelectorAll('script, img').length") == 0
            assert SCRIPT in chromium.run("return document.querySelector('#step-8 article').innerText")
            assert chromium.run("return document.querySelectorAll('#step-8 div.text > del').length") == 10
            assert chromium.run("return document.documentElement.scrollWidth") <= pixels
            colour = "return getComputedStyle(document.querySelector('#step-8 article .f6')).backgroundColor"
            by_f = chromium.run(colour)
            chromium.run("document.querySelector('#step-8 label[for=by-h]').click()")
            assert by_f.startswith("rgba(214, 96, 0") and chromium.run(colour).startswith("rgba(0, 138, 92")
        assert {url for url in chromium.asked() if not url.startswith("data:")} == {address}
        assert chromium.log("browser") == []


@needs_browser
def test_a_browser_shows_one_step_and_a_link_leads_to_the_next(run, tmp_path):
    write_step(run, worse(6))
    address = write_explanation(run, None, tmp_path / "explain.html").as_uri()
    with browser(tmp_path / "profile") as chromium:

        def seen() -> list[str]:
            steps = "[...document.querySelectorAll('.step')].filter(step => step.checkVisibility())"
            return chromium.run(f"return {steps}.map(step => step.id)")

        chromium.width(390)
        chromium("POST", "/url", url=address)
        assert seen() == ["step-6"]
        first = "return document.querySelector('#step-6 article').getBoundingClientRect().top"
        assert chromium.run(first) < 844  # on the first screen of a phone
        chromium.run("document.querySelector('#step-6 [rel=next]').click()")
        assert seen() == ["step-8"]
        chromium.run("document.querySelector('#step-8 [rel=prev]').click()")
        chromium.run("document.querySelector('#step-6 [rel=prev]').click()")
        assert seen() == ["step-4"]
        chromium("POST", "/back")
        assert seen() == ["step-6"]
