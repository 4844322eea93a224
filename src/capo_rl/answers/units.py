"""What may stand behind a number without changing it: a unit or the thing that is counted, and no variable."""

from __future__ import annotations

import re

from capo_rl.answers.notation import bare


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_SYMBOLS = _set(
    """
    mm cm dm km nm in ft yd mi mg kg lb lbs oz ml mL cl dl kl hr hrs min mins sec secs ms ns yr yrs mo kph mph kmh
    kmph fps rpm bpm Hz kHz MHz GHz kW MW Wh kWh eV keV MeV GeV Pa kPa MPa atm bar mol mmol rad deg pt pts qt gal
    tsp tbsp cal kcal kJ MJ kN mN mV kV mA kg cc ha sq cu pm am PM AM kB MB GB TB KB USD EUR GBP CAD AUD JPY CNY INR
    Rs rs RMB dB Wb Ohm ohm AU ly Bq Sv erg usd
    """
)
_ALONE = _set("m g s h L l N J W V K")  # a single letter is a variable, but for these
_IN_COMPOUNDS = _ALONE | _set("A C F T")
_CONNECTING = _set("a an the of per in at on by for each and every from with his her its their as")
# Words that make another number of it, or no number.
_CHANGING = _set(
    """
    one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety zero once twice thrice hundred hundreds
    thousand thousands million millions billion billions trillion dozen dozens gross score half halves third thirds
    fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth
    hundredths thousandth thousandths millionth millionths plus minus over divided multiplied squared cubed
    factorial mod modulo choose root power raised not but or if when unless except than base to out until through
    between remainder else also maybe possibly wrong either neither nor point double triple log sin cos tan sqrt
    infinity undefined none
    """
)
_QUANTITY = re.compile(
    r"([-+]?(?:\\?\$|[€£¥₹₩])?[-+]?\s*(?:\\frac\{[^{}]*\}\{[^{}]*\}|(?:[0-9][0-9,]*\.?[0-9]*|\.[0-9]+)(?:\s*/\s*[0-9]+)?)"
    r"(?:\s*(?:\\times|\\cdot|\*)\s*10\^(?:\{[-+]?[0-9]+\}|[0-9]))?\s*(?:\\?%)?)(?=[^0-9])\s*(.+)",
    re.DOTALL,
)
_LONGEST = 200  # characters of a number and its unit
_TEXT = re.compile(r"\\(?:text|mathrm)\s*\{([^{}]*)\}")


def without_words(text: str, letters: bool) -> str:
    r"""A number without the unit or the words behind it, and any other text as it is.

    With `letters`, a single letter may be a unit on its own, as in `5 m`; one of a compound unit always may.

    >>> without_words("10 km/h", True), without_words("18 apples", False), without_words("5 x", True)
    ('10', '18', '5 x')
    """
    found = _QUANTITY.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    return found[1].strip() if found and _is_unit(found[2], letters) else text


def changes(text: str) -> bool:
    """Whether text behind a number makes another number of it: `dozen`, `or six`, a number, a variable."""
    words = re.findall(r"[A-Za-z]+", text)
    return (
        any(word.casefold() in _CHANGING for word in words)
        or any(len(word) == 1 and word in "xyznkie" for word in words)
        or bool(re.search(r"(?<![\^{A-Za-z0-9-])\s*(?<![\^{A-Za-z0-9-])[0-9]", re.sub(r"\^\{[^{}]*\}", "", text)))
    )


def _is_unit(text: str, letters: bool) -> bool:
    text = _TEXT.sub(r" \1 ", text)
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\[,;:! ]|~", " ", text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)", " deg ", text)
    text = re.sub(r"\\Omega(?![A-Za-z])", " ohm ", re.sub(r"\\mu(?![A-Za-z])\s*", "u", text))
    text = re.sub(r"(?<=[A-Za-z.])\s*\^\s*(?:\{\s*-?[1-9]\s*\}|-?[1-9])", "", text)
    text = re.sub(r"\\?\$|[€£¥₹₩¢]", " usd ", text)
    text, compounds = re.subn(r"\\cdot|\\times|[/*]", " / ", text)
    words = re.sub(r"[{}()]", " ", text).split()
    if not words or not re.fullmatch(r"[A-Za-z.'/ -]+", " ".join(words)):
        return False
    units = [word.strip(".'-") for word in words if word != "/"]
    compound = bool(compounds) or "deg" in units
    allowed = _IN_COMPOUNDS if compound else _ALONE if letters else frozenset()
    if words[-1] == "/":
        return False
    for at, word in enumerate(units):
        first = at == 0
        if word in _SYMBOLS or (word.startswith("u") and word[1:] in _SYMBOLS | _ALONE):
            continue
        if len(word) <= 1:
            if word not in allowed and (first or word != "a"):
                return False
        elif word.casefold() in _CONNECTING:
            if (first and word.casefold() != "per") or at == len(units) - 1:
                return False
        elif word.casefold() in _CHANGING or len(word) < 3 or not _is_word(word):
            return False
    return True


def _is_word(word: str) -> bool:
    """Whether this is a word, not a product of variables such as `xyz` or `abc`."""
    return bool(re.search("[aeiouyAEIOUY]", word)) and not re.fullmatch("[abcxyz]{3}|[abcdwxyz]{4,}", word.casefold())


_AS_TEXT = r"\\(?:text|textbf|textrm|mathrm|mbox)\s*\{(?:[^{}]|\{[^{}]*\})*\}"
# Text after a number, with its power. No two parts of this can match the same space: it takes linear time.
_TEXT_UNIT = re.compile(
    rf"(?:(?: ?(?:\\cdot|/|\\[,;: ]|~) ?| )?(?:\\mu ?)?{_AS_TEXT}(?:\^(?:\{{-?[0-9]\}}|-?[0-9]))?)+ ?$"
)
# Words that are a part of the number, or of a list.
_NO_UNIT = re.compile(r"hundred|dozen|\bor\b|\band\b|[a-z]\s*\{\s*(?:[0-9.]+|[ei])\s*\}", re.IGNORECASE)


def without_unit(text: str, unit: str | None = None) -> str:
    r"""The text without a unit behind it that is set as text, and without `unit`; a unit is not checked.

    >>> without_unit(r"864 \text{ inches}^2"), without_unit("45 minutes", "minute"), without_unit(r"\text{east}")
    ('864', '45', '\\text{east}')
    """
    text = re.sub(r"\s+", " ", text)
    found = _TEXT_UNIT.search(text)
    if found and text[: found.start()].strip() and not _NO_UNIT.search(found[0]) and not changes(found[0]):
        text = text[: found.start()].rstrip()
    plain = bare(unit or "").strip()
    if plain and (ended := re.search(rf"(?<![A-Za-z\\])\s*{re.escape(plain)}s?$", text)) and ended.start():
        text = text[: ended.start()].rstrip()
    return text


_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"(?<=[0-9])[\s~]*(\\(?:text|mathrm|mbox)\s*\{{[\s~]*)?({'|'.join(_SCALES)})s?\b(?(1)[^{{}}]*\}})")


def scaled(text: str) -> str:
    r"""The text with a power of ten where it says so in words.

    >>> scaled(r"5 \text{ million}"), scaled("5 million dollars")
    ('5\\times 10^{6}', '5\\times 10^{6} dollars')
    """
    return _SCALE.sub(lambda found: rf"\times 10^{{{_SCALES[found[2]]}}}", text)
