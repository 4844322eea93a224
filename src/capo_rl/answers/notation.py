r"""One spelling for what people and models write in several: Unicode, LaTeX's synonyms, decimals that repeat.

`plain` is the first thing that happens to an answer and to its reference answer. It changes how a text is spelt and
never what it says, so that equal answers look more alike before anything is compared, and math-verify sees LaTeX that
it reads rightly.
"""

from __future__ import annotations

import functools
import re
import unicodedata

# --- characters

_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau "
    "upsilon phi chi psi omega"
)
_VULGAR = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
_HIGH, _LOW = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣᵃᵇᶜᵏᵐ", "₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙᵢₓₐ"
_SYMBOLS = {
    "−‐‑‒–—―﹣": "-",
    "×✕✖⨯": r"\times ",
    "·⋅∙•": r"\cdot ",
    "÷∕⁄": "/",
    "∗": "*",
    "±": r"\pm ",
    "∓": r"\mp ",
    "°º": r"^\circ ",
    "∞": r"\infty ",
    "≤⩽≦": r"\leq ",
    "≥⩾≧": r"\geq ",
    "≠": r"\neq ",
    "≈": r"\approx ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅⌀": r"\emptyset ",
    "∖": r"\setminus ",
    "⊂": r"\subset ",
    "⊆": r"\subseteq ",
    "→": r"\to ",
    "∑": r"\sum ",
    "∏": r"\prod ",
    "∫": r"\int ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "⟨〈": r"\langle ",
    "⟩〉": r"\rangle ",
    "∠": r"\angle ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}",
    "∣｜": "|",
    "…⋯": r"\ldots ",
    "′’‘": "'",
    "“”„": '"',
    "\u00a0\u2009\u202f": r"\,",
    "\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u200a\u205f\u3000": " ",
    "，": ",",
    "；": ";",
    "：": ":",
    "（": "(",
    "）": ")",
    "［": "[",
    "］": "]",
    "＝": "=",
    "＋": "+",
    "－": "-",
    "％": "%",
    "￥": "¥",
    "ϕ": r"\phi ",
    "ϵ": r"\epsilon ",
    "ϑ": r"\theta ",
    "µ": r"\mu ",
    "∛": r"\sqrt[3]",
    "∜": r"\sqrt[4]",
    "√": r"\sqrt",
    "ℯ": "e",
    "ⅈ": "i",
}
_CHARACTERS: dict[int, str] = {ord(c): latex for cs, latex in _SYMBOLS.items() for c in cs}
for _name in _GREEK.split():
    # Unicode spells it LAMDA; capitals that look like Latin letters have no command.
    _unicode = {"lambda": "LAMDA"}.get(_name, _name.upper())
    _CHARACTERS[ord(unicodedata.lookup(f"GREEK SMALL LETTER {_unicode}"))] = rf"\{_name} "
    if _name in ("gamma", "delta", "theta", "lambda", "xi", "pi", "sigma", "upsilon", "phi", "psi", "omega"):
        _CHARACTERS[ord(unicodedata.lookup(f"GREEK CAPITAL LETTER {_unicode}"))] = rf"\{_name.capitalize()} "
for _character in _VULGAR:
    _above, _below = unicodedata.normalize("NFKC", _character).split("⁄")
    _CHARACTERS[ord(_character)] = rf"\frac{{{_above}}}{{{_below}}}"
_CHARACTERS |= {code: unicodedata.normalize("NFKC", chr(code)) for code in range(0x1D400, 0x1D6A4)}  # 𝑥, not 𝟏
_SHIFTED = {ord(c): unicodedata.normalize("NFKC", c).replace("−", "-") for c in _HIGH + _LOW}


def _ascii(text: str) -> str:
    text = re.sub(f"[{_HIGH}]+", lambda found: f"^{{{found[0].translate(_SHIFTED)}}}", text)
    text = re.sub(f"[{_LOW}]+", lambda found: f"_{{{found[0].translate(_SHIFTED)}}}", text)
    return text.translate(_CHARACTERS)


# --- commands

_FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc exp log ln lg cis"
_NOTHING = (
    "displaystyle textstyle scriptstyle limits nolimits left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr "
    "bf rm it tt sf bfseries boldmath large Large normalsize quad qquad mathstrut"
)
_COMMANDS = {
    **dict.fromkeys(_NOTHING.split(), " "),
    **dict.fromkeys(["dfrac", "tfrac", "cfrac"], r"\frac"),
    **dict.fromkeys(
        ["textbf", "textit", "textrm", "textnormal", "textsf", "texttt", "textup", "emph", "mbox", "hbox"], r"\text"
    ),
    **dict.fromkeys(["mathbf", "bm", "boldsymbol", "mathit", "mathnormal", "pmb"], ""),
    **dict.fromkeys(["le", "leqslant"], r"\leq"),
    **dict.fromkeys(["ge", "geqslant"], r"\geq"),
    **dict.fromkeys(["varnothing", "empty"], r"\emptyset"),
    **dict.fromkeys(["lvert", "rvert", "vert"], "|"),
    **dict.fromkeys(["dots", "cdots", "dotsc"], r"\ldots"),
    **dict.fromkeys(["smallsetminus", "backslash"], r"\setminus"),
    **dict.fromkeys(["degree", "textdegree"], r"^\circ"),
    **dict.fromkeys(["euro", "texteuro"], "€"),
    **dict.fromkeys(["pounds", "textsterling"], "£"),
    **dict.fromkeys(["yen", "textyen"], "¥"),
    "textdollar": r"\$",
    "ne": r"\neq",
    "lt": "<",
    "gt": ">",
    "lbrace": r"\{",
    "rbrace": r"\}",
    "lbrack": "[",
    "rbrack": "]",
    "cdotp": r"\cdot",
    "ast": "*",
    "div": "/",
    "imath": "i",
    "lg": r"\log_{10}",
    "arccot": r"\operatorname{arccot}",
}
_COMMAND = re.compile(r"\\([A-Za-z]+)(?:(?<=left)\.|(?<=right)\.)?")
_NAMED = re.compile(rf"\\(?:mathrm|operatorname\*?|text)\s*\{{\s*({'|'.join(_FUNCTIONS.split())}|[eid])\s*\}}")
_TEXT = re.compile(r"(\\(?:text|mathrm)\s*\{(?:[^{}]|\{[^{}]*\})*\})")
_WORDS = re.compile(
    rf"(?<![A-Za-z\\])({'|'.join(_FUNCTIONS.split())}|sqrt|{'|'.join(_GREEK.split())}|infinity|infty|inf)(?![A-Za-z])"
)
_PERCENT = re.compile(
    r"\\text\s*\{\s*(?:percent|per cent|pct)\s*\}|(?<=[0-9} ])\s*\b(?:percent|per cent|pct)\b(?![^{]*\})"
)


def _command(found: re.Match[str]) -> str:
    latex = _COMMANDS.get(found[1])
    if latex is None:
        return found[0]
    after = found.string[found.end() : found.end() + 1]
    return latex + " " if latex[-1:].isalpha() and after.isalpha() else latex


def _word(found: re.Match[str]) -> str:
    return r"\infty " if found[1].startswith("inf") else rf"\{found[1]} "


def _closed(text: str, start: int) -> int:
    """Where the bracket at `start` closes, or -1."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in "([{") - (text[at] in ")]}")
        if depth == 0:
            return at
    return -1


_ROOT = re.compile(r"\\sqrt\s*(?:\[[^\[\]]*\])?\s*(?=\()")
_ROOT_OF_TOKEN = re.compile(r"(\\sqrt)\s*(\[[^\[\]{}]*\])?\s*([0-9]+(?:\.[0-9]+)?|[A-Za-z]|\\[A-Za-z]+)(?![A-Za-z{])")
_CIS = re.compile(
    r"\\cis\s*(?:\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}|\(([^()]*)\)"
    r"|([0-9.]*\s*(?:\\frac\{[^{}]*\}\{[^{}]*\}|\\pi|\\theta)?(?:/[0-9]+)?(?:\^\{?\\circ\}?)?))"
)


def _roots(text: str) -> str:
    for _ in range(text.count(r"\sqrt")):
        found = next((m for m in _ROOT.finditer(text) if _closed(text, m.end()) > 0), None)
        if found is None:
            break
        end = _closed(text, found.end())
        text = f"{text[: found.end()]}{{{text[found.end() + 1 : end]}}}{text[end + 1 :]}"
    return text


# --- numbers

_REPEATED = re.compile(
    r"(?<![0-9.])([0-9]*)\.([0-9]*)(?:\\(?:overline|bar|dot|overset\{\\cdot\}|overset\{\.\})\s*(?:\{([0-9]+)\}|([0-9]))"
    r"(?:([0-9]*)\\dot\s*(?:\{([0-9])\}|([0-9])))?|(?<=\.)\(([0-9]+)\))(?![0-9])"
)
_CONTINUED = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]*?)([0-9]{1,20}?)\3{2,}\s*(?:\.\.\.|\\ldots)")
_GROUPED = re.compile(
    r"(?<![0-9.,_^])(?<![0-9][ ~])(?<![0-9]\\[,;: ])[1-9][0-9]{0,2}"
    r"(?:(?:\{,\}|,\\!|\\[,;:! ]|~| )[0-9]{3})+(?![0-9])(?!\s*/|,\s*[0-9]|[ ~]*[0-9]|\s*\\frac)"
)
_SEPARATOR = re.compile(r"\{,\}|,\\!|\\[,;:! ]|~| ")
_FRAC = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
_MIXED = re.compile(
    r"(?<![0-9A-Za-z.,_^}\\)])([0-9]{1,30})(?:(?:\s|~|\\[,;:! ])*\\frac\{([0-9]{1,30})\}\{([0-9]{1,30})\}"
    r"|(?:[ ~]|\\[,;: ])+([0-9]{1,30})\s*/\s*([0-9]{1,30})(?![0-9]*[.,]?[0-9A-Za-z(]))"
)


def _fraction(whole: str, fixed: str, repeated: str) -> str:
    above = int((whole or "0") + fixed + repeated) - int((whole or "0") + fixed)
    return rf"\frac{{{above}}}{{{(10 ** len(repeated) - 1) * 10 ** len(fixed)}}}"


def _repeated(found: re.Match[str]) -> str:
    whole, fixed, *parts = found.groups()
    repeated = "".join(part for part in parts if part)
    return found[0] if len(found[0]) > 120 else _fraction(whole, fixed, repeated)


def _continued(found: re.Match[str]) -> str:
    return _fraction(*found.groups())


def _mixed(found: re.Match[str]) -> str:
    whole, *rest = found.groups()
    above, below = (int(part) for part in rest if part)
    if not 0 < above < below:  # `3 5/2` is not one, and what else it is nobody knows
        return found[0]
    return rf"\frac{{{int(whole) * below + above}}}{{{below}}}"


# --- all of it

_DOUBLED = re.compile(
    r"\\\\(?=[{}%$]|(?:[dt]?frac|sqrt|pi|text|cdot|times|left|right|math|infty|theta|alpha|beta|log|ln|sin|cos|tan|pm|leq?|geq?"
    r"|neq?|cup|cap|in|circ|overline|emptyset|angle)(?![a-z]))"
)
_NEEDS_NOTHING = re.compile(r"[-+0-9,]*(?:\.[0-9]*)?")


def plain(text: str) -> str:
    r"""The text in one spelling.

    >>> plain("2√3"), plain(r"3\tfrac12"), plain(r"0.1\overline{6}"), plain(r"32\,348"), plain("x²")
    ('2\\sqrt{3}', '\\frac{7}{2}', '\\frac{15}{90}', '32348', 'x^{2}')
    """
    return text if _NEEDS_NOTHING.fullmatch(text) else _plain(text)


@functools.lru_cache(maxsize=4096)
def _plain(text: str) -> str:
    if not text.isascii():
        text = _ascii(text)
    text = re.sub(r"\s{2,}", " ", text)
    text = text.replace(r"\[", " ").replace(r"\]", " ").replace(r"\(", " ").replace(r"\)", " ")
    if r"\begin" not in text:
        # A doubled backslash is one that went through JSON, or the end of a line.
        text = re.sub(r"\\\\\s*$|^\s*\\\\(?![A-Za-z])", "", _DOUBLED.sub(r"\\", text))
    if "\\" in text:
        text = _COMMAND.sub(_command, text)
        text = _NAMED.sub(lambda found: found[1] if len(found[1]) == 1 else _word(found), text)
        text = _FRAC.sub(
            lambda m: rf"\frac{{{m[2] if m[1] is None else m[1]}}}{{{m[4] if m[3] is None else m[3]}}}", text
        )
        text = re.sub(r"\\\{\s*\\\}", r"\\emptyset", text)
        text = re.sub(r"\\mathbb\s+([A-Z])", r"\\mathbb{\1}", text)
    if "per" in text or "pct" in text:
        text = _PERCENT.sub(r"\\%", text)
    if re.search("[A-Za-z]{2}", text):
        text = "".join(
            piece if at % 2 else _WORDS.sub(_word, piece) for at, piece in enumerate(_TEXT.split(text))
        )  # the odd pieces are the texts
        text = text.replace(r"\lg ", r"\log_{10}")
    text = text.replace("**", "^") if re.search(r"[0-9A-Za-z)}]\*\*[0-9A-Za-z({]", text) else text
    text = re.sub(r"<=|=<", r"\\leq ", re.sub(r">=|=>", r"\\geq ", text)) if re.search("[<>]", text) else text
    text = re.sub(r"(?<![0-9)])!=|=/=|(?<=\s)!=", r"\\neq ", re.sub(r":=|==", "=", text)) if "=" in text else text
    if r"\sqrt" in text:
        text = _ROOT_OF_TOKEN.sub(r"\1\2{\3}", _roots(text))
    if r"\cis" in text:
        text = _CIS.sub(r"(\\cos(\1\2\3)+i\\sin(\1\2\3))", text)
    if "." in text:
        text = _CONTINUED.sub(_continued, _REPEATED.sub(_repeated, text))
    text = _GROUPED.sub(lambda found: _SEPARATOR.sub("", found[0]), text)
    return _MIXED.sub(_mixed, text)


# --- looks

_BEFORE, _AFTER = " \t\r\n$", " \t\r\n$.,;:"  # what may surround an answer without changing it


def bare(answer: str) -> str:
    r"""The answer without the dollars, spaces and punctuation around it; `\,` and `\$` stay whole."""
    answer = answer.lstrip(_BEFORE)
    kept = answer.rstrip(_AFTER)
    return answer[: len(kept) + 1] if kept.endswith("\\") else kept


SPACING = re.compile(r"(?<!\\)\\[,!;: ]|~")
_BRACED = re.compile(r"\{[^{}]*\}")
_UNNEEDED_SPACE = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])")


def squeezed(text: str) -> str:
    r"""The text without what only changes how it looks.

    >>> squeezed(r"\left( 3,\, \dfrac{\pi}{2} \right)")
    '(3,\\frac{\\pi}{2})'
    """
    text = _UNNEEDED_SPACE.sub("", SPACING.sub(" ", bare(plain(text))).replace("{,}", ","))
    while text.startswith("{") and _BRACED.fullmatch(text):
        text = text[1:-1]
    return bare(text)
