"""Where the answer stands in a completion: in the last box, or where the text says what it is."""

from __future__ import annotations

import re

TAIL = 16_384  # characters of a completion that are read, from its end: the answer comes last
LONGEST_ANSWER = 2_000  # the longest reference answer of MATH has 159 characters
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_HASHES = re.compile(r"^####[ \t]*(\S.*)$", re.MULTILINE)
_STATED = re.compile(r"\banswer\b[\s*]*(?:is\b|:)[\s:*]*", re.IGNORECASE)
# Where what is stated ends before its line does: at a sentence, or at a clause that only explains it.
_STATED_END = re.compile(r"(?<=[.!?])\$*\s+(?=[A-Z])|(?<!\s),?\s+(?:because|since|which|where)\b")
_BOLD_END = re.compile(r"(?<=[^\s*])\*\*(?=[\s.,;:]|$)")
_DELIMITED = re.compile(r"\\[(\[]((?:(?!\\[()\[\]]).)*)\\[)\]][.,;:]?")


def final_text(completion: str) -> str:
    """What follows the reasoning: the text after the last `</think>`, up to a `<think>` that was never closed.

    >>> final_text("<think>2+2=4</think>It is 4.")
    'It is 4.'
    >>> final_text("<think>2+2=4, no wait")
    ''
    """
    return completion.rpartition("</think>")[2].partition("<think>")[0]


def extract_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}`, or `None`; linear in the length of the text.

    >>> extract_answer(r"First \boxed{1}, no: $\boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    >>> extract_answer(r"so it is $\boxed 2$.")
    '2'
    >>> extract_answer(r"cut off: \boxed{\frac{1}{2")
    """
    start = None
    for box in _BOX.finditer(text):
        start = box.end()
    if start is None:
        return None
    if not text.startswith("{", start):
        token = re.compile(r"[^\s$]*").match(text, start)
        return (token[0].rstrip(".,;:") if token else "") or None
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)  # an escaped brace is matched with its backslash: 0
        if depth == 0:
            return text[start + 1 : brace.start()].strip()
    return None


def stated_answer(text: str) -> str | None:
    """The answer outside a box: after the last `####` that starts a line, else what the last line says it is.

    >>> stated_answer("3 * 14 = 42\\n#### 42"), stated_answer("Hence:\\n**Answer:** C"), stated_answer("I see 42.")
    ('42', 'C', None)
    >>> stated_answer("The answer is $2$. I hope it is correct."), stated_answer("The answer is 4, but it may be 5.")
    ('$2$.', '4, but it may be 5.')
    """
    if hashes := _HASHES.findall(text):
        answer = hashes[-1]
    else:
        _, *stated = _STATED.split(text.rstrip().rpartition("\n")[2])
        answer = stated[-1] if stated else ""
        if ended := _STATED_END.search(answer):
            answer = answer[: ended.start()]
    answer = _BOLD_END.sub("", answer).strip(" \t\r*")
    delimited = _DELIMITED.fullmatch(answer)
    return (delimited[1].strip() if delimited else answer) or None
