"""What a token says, as text on a page: hostile, since a policy in training says anything.

All of it is escaped, and characters that a browser would obey or not show (controls, bidirectional overrides, zero
widths) are spelled out.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A character of UTF-8 has at most this many bytes, and so as many tokens that each decode to nothing whole.
_BYTES = 4


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it.

    A character whose bytes are in several tokens is the last one's, and the others add nothing.
    """

    def decode(some: Sequence[int]) -> str:
        text = tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text if isinstance(text, str) else "".join(text)

    texts = []
    start = end = 0  # the last token whose text was whole: a decoder may drop a space at the start of what it is given
    for now in range(1, len(ids) + 1):
        before, text = decode(ids[start:end]), decode(ids[start:now])
        if text.endswith("�") and now < len(ids) and now - end < _BYTES:
            texts.append("")
            continue
        texts.append(text[len(before) :] if text.startswith(before) else decode(ids[end:now]))
        start, end = end, now
    return texts


def _name(character: str) -> str:
    """What to show in place of a character that would be obeyed or not seen; empty for all others."""
    if character in "\n\t":
        return "↵" if character == "\n" else "⇥"
    hidden = unicodedata.category(character)[0] == "C" or character in "\u2028\u2029"
    return f"U+{ord(character):04X}" if hidden else ""


def cell_text(text: str) -> str:
    """A token's text as a table shows it: with its spaces, and never empty."""
    return spelled(text).replace(" ", "␣") or "…"


def spelled(text: str) -> str:
    """Text on one line, with what can't be seen by its name; not escaped.

    >>> spelled("a\\x00b\\n\\u202e")
    'aU+0000b↵U+202E'
    """
    return "".join(_name(character) or character for character in text)


def marked(text: str) -> str:
    """Text as HTML, with what can't be seen by its name, set apart.

    >>> marked("<b>\\x1b")
    '&lt;b&gt;<i>U+001B</i>'
    """
    parts = (f"<i>{name}</i>" if (name := _name(character)) else escape(character) for character in text)
    return "".join(parts).replace("<i>↵</i>", "<i>↵</i>\n")
