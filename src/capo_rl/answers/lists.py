"""Several answers in one, and the brackets around them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from capo_rl.answers.notation import SPACING, bare, plain, squeezed

_NAME = re.compile(r"^\(?[A-Za-z](?:_(?:\w|\{\w+\}))?(?:, ?[A-Za-z](?:_(?:\w|\{\w+\}))?)*\)?\s*(?:=|\\in(?![A-Za-z]))")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])")
LISTED = re.compile(r"(?:, ?|\b| )(?:\\(?:text|mathrm) ?\{ ?(?:and|or) ?\}|(?:and|or)\b)|;")


def parts(text: str, expected: int | None = None) -> list[str]:
    r"""The answers of a list, cut at its outer commas, with `\pm` written out.

    Where this doesn't give the `expected` number, commas inside numbers such as `1,350` don't count.

    >>> parts(r"(1,2), (3,4)"), parts(r"x = \pm 2 \text{ or } 5"), parts("2,400, 864", 2)
    (['(1,2)', '(3,4)'], ['+2', '-2', '5'], ['2400', '864'])
    """
    text = re.sub(r"\s+", " ", SPACING.sub(" ", bare(plain(text)).replace("{,}", "").replace(r",\!", "")))
    text = _NAME.sub("", text, count=1).strip()
    if text.startswith(r"\{") and text.endswith(r"\}") and text.count(r"\{") == 1:
        text = text[2:-2]
    elif re.fullmatch(r"\{[^{}]*,[^{}]*\}", text):  # a set whose backslashes went astray
        text = text[1:-1]
    text = LISTED.sub(", ", text)
    found = cut(text)
    if expected is not None and len(found) != expected:
        found = cut(_THOUSANDS.sub(lambda grouped: grouped[0].replace(",", ""), text))
    return found


def cut(text: str) -> list[str]:
    pieces, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character == ",":
            pieces.append(text[start:at])
            start = at + 1
    pieces.append(text[start:])
    return _expanded([piece for piece in map(bare, pieces) if piece])


def _expanded(pieces: list[str]) -> list[str]:
    both = (
        [piece.replace(r"\pm", sign).replace("±", sign).replace("+ ", "+").replace("- ", "-") for sign in "+-"]
        if r"\pm" in piece or "±" in piece
        else [piece]
        for piece in pieces
    )
    return [_NAME.sub("", piece, count=1).strip() for pair in both for piece in pair]


def matched(answers: Sequence[str], golds: Sequence[str], equal: Callable[[str, str], bool]) -> bool:
    """Whether the answers are the reference answers in some order, each of them once."""
    if len(answers) != len(golds):
        return False
    left = list(answers)
    for gold in golds:
        found = next((i for i, answer in enumerate(left) if equal(answer, gold)), None)
        if found is None:
            return False
        del left[found]
    return True


def brackets_of(text: str) -> str | None:
    """The brackets around a list of several, by which a set differs from a point or an interval."""
    text = squeezed(re.sub(r"^[^=({\[]*(?:\([^()]*\))?=", "", plain(text)))
    inner = text[2:-2] if text.startswith(r"\{") and text.endswith(r"\}") else text[1:-1]
    opening = text[: (len(text) - len(inner)) // 2]
    if opening not in ("(", "[", r"\{") or text[-1:] not in ")]}" or len(cut(inner)) < 2:
        return None
    depth = 0
    for character in inner:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return None
    return opening + text[-1]
