"""The page about a step: hostile completions are text on it, every verdict has its reason, and a browser shows it."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_tokens import some_tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from capo_rl.cli import main
from capo_rl.pages.explain import ExplainError, token_texts, write_explanation
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


def test_hostile_text_is_text(run, tmp_path):
    page = write_explanation(run, 4, tmp_path / "deep" / "explain.html").read_text()
    elements = Elements(page)
    assert {tag for tag, _ in elements.all}.isdisjoint({"script", "img", "iframe"})
    assert not [name for _, attributes in elements.all for name in attributes if name.startswith("on")]
    assert len(re.findall("</body>", page)) == 1
    # what a browser would obey or not show is spelled out, in the text, in the tables and in the tooltips
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]", page)
    for name in ("U+0000", "U+001B", "U+202E", "U+200B", "↵"):
        assert page.count(f"<i>{name}</i>") == 2 and page.count(name) > 5, name
    tips = [attributes["title"] for tag, attributes in elements.all if "title" in attributes]
    assert len(tips) == 2 * len(HOSTILE)
    assert any(SCRIPT in tip for tip in tips)
    assert SCRIPT in elements.text and "&lt;U+200B&amp;" in elements.text


def test_each_token_has_its_values_and_its_reason(run, tmp_path):
    page = write_explanation(run, None, tmp_path / "explain.html").read_text()
    assert "<title>Step 8: which tokens were rejected, and why</title>" in page
    assert "Run a&amp;b, optimizer step 8: 10 of 20 tokens were rejected." in page
    elements = Elements(page)
    tips = {tag: [a["title"] for t, a in elements.all if t == tag and "title" in a] for tag in ("span", "del")}
    assert len(tips["span"]) == len(tips["del"]) == 10
    for tip in tips["span"]:
        assert tip.endswith("log π(a) -0.25\nA 1.5\nmissing mass 0.01\nkept")
    for tip in tips["del"]:
        assert tip.endswith("A -0.5\nmissing mass 0.01\nrejected: m_F > 0.1")
    assert "Completion 1 · A = 1.5 · reward 1 · 0 of 10 rejected" in page
    assert "Completion 2 · A = -0.5 · no reward · 10 of 10 rejected" in page
    assert "<td>rejected, A &lt; 0</td><td>10 of 10 (100.0%)</td>" in page
    assert "<td>rejected, A &gt; 0</td><td>0 of 10 (0.0%)</td>" in page
    assert "<td>tokens with m_F &gt; 0.1</td><td>10</td>" in page
    assert "<td>bounds on m_H</td><td>≥ -1</td>" in page
    # the colours: 3 at the bound, 6 more than a hundred times above it
    levels = [int(a["class"][1]) for _, a in elements.all if "title" in a]
    assert levels[0] == 0 and max(levels[:10]) == 3 and min(levels[10:]) == 4 and levels[-1] == 6


def test_the_tally_is_over_all_recorded_steps(run, tmp_path):
    page = unescape(write_explanation(run, 4, tmp_path / "explain.html").read_text())
    assert "Counted over 2 recorded steps, 4 to 8." in page
    tally = page[page.index('<h2 id="run">') : page.index('<h2 id="completions">')]
    assert "<h3>A > 0</h3>\n<p>None was rejected.</p>" in tally
    assert "<td>prompt</td><td>2</td><td>2</td><td>100%</td>" in tally and tally.count("<tr><td>") == 10


def test_a_verdict_that_is_not_by_bounds_alone_says_so(run, tmp_path):
    write_step(run, hostile_tokens(9, judged="sequence", mode="monitor", fisher=None, low=None))
    page = write_explanation(run, None, tmp_path / "explain.html").read_text()
    assert "would have been rejected; the run was only watched" in page
    assert "rejected: judged by the mean of its sequence" in page
    assert "<td>bound on m_F</td><td>none</td>" in page
    write_step(run, some_tokens(about={"step": 10}))
    page = write_explanation(run, None, tmp_path / "explain.html").read_text()
    assert page.count("rejected: not finite") == page.count("rejected: m_H &lt; -1") == 1


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
            assert chromium.run("return document.title") == "Step 8: which tokens were rejected, and why"
            assert chromium.run("return document.querySelectorAll('script, img').length") == 0
            assert SCRIPT in chromium.run("return document.querySelector('article').innerText")
            assert chromium.run("return document.querySelectorAll('article div.text > del').length") == 10
            assert chromium.run("return document.documentElement.scrollWidth") <= pixels
            colour = "return getComputedStyle(document.querySelector('article .f6')).backgroundColor"
            by_f = chromium.run(colour)
            chromium.run("document.querySelector('#by-h').click()")
            assert by_f.startswith("rgba(214, 96, 0") and chromium.run(colour).startswith("rgba(0, 138, 92")
        assert {url for url in chromium.asked() if not url.startswith("data:")} == {address}
        assert chromium.log("browser") == []
