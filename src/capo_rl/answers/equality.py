"""When an answer equals the reference answer: at once where no algebra is needed, else by algebra."""

from __future__ import annotations

import re

from capo_rl.answers import algebra
from capo_rl.answers.equations import OTHER_RELATION, as_number, cut_at_equals, gold_number, ratio, unwrapped, value
from capo_rl.answers.intervals import as_intervals
from capo_rl.answers.lists import brackets_of, cut, matched, parts
from capo_rl.answers.notation import plain, squeezed
from capo_rl.answers.numbers import based, clock, compared, number, same_time
from capo_rl.answers.rule import Rule
from capo_rl.answers.units import without_unit
from capo_rl.answers.words import is_word, letter, other_case, spelling


def quick(answer: str, gold: str, rule: Rule) -> tuple[bool, str] | None:
    r"""The verdict and its reason, or `None` where only algebra can tell.

    >>> quick("1/2", "0.5", Rule()), quick(r"\frac{\pi}{2}", "1.57", Rule())
    ((True, 'the same number'), None)
    """
    if rule.kind == "letter":
        named = letter(answer)
        if named is None:
            return False, "not a letter"
        return (True, "the same letter") if named == letter(gold) else (False, "another letter")
    text, gold_text = squeezed(answer), squeezed(gold)
    if text == gold_text:
        return True, "the same text"
    a, b = as_number(answer, rule), gold_number(gold, rule)
    if a is not None and b is not None:
        return compared(a, b, rule)
    # What follows would be read as numbers, products or points by an algebra that knows nothing of it.
    times = clock(answer), clock(gold)
    if times[0] is not None and times[1] is not None:
        return (True, "the same time") if same_time(times[0], times[1]) else (False, "another time")
    bases = based(answer), based(gold)
    if bases[0] is not None and bases[1] is not None:
        return (True, "the same number") if bases[0] == bases[1] else (False, "another number")
    if any(bases) and (a is not None or b is not None):
        return False, "a number that names its base against one that does not"
    brackets = brackets_of(answer), brackets_of(gold)
    if all(brackets) and brackets[0] != brackets[1]:
        return False, "another kind of brackets"
    if other_case(text, gold_text):
        return False, "the same letters in another case"
    words, gold_words = spelling(text), spelling(gold_text)
    if (
        words is not None
        and gold_words is not None
        and ("\\" in text[:1] + gold_text[:1] or is_word(words, gold_words))
    ):
        return (True, "the same words") if words == gold_words else (False, "other words")
    if rule.kind != "math" and b is not None and ("," in unwrapped(answer) or OTHER_RELATION.search(plain(answer))):
        return False, "not one number"
    return None


def judge(answer: str, gold: str, rule: Rule) -> tuple[bool | None, str]:
    """The verdict where `quick` has none: `None` if the reference answer can't be read."""
    answer, gold = plain(answer), plain(gold)
    golds = parts(gold) if rule.multiple else [gold]
    answers = parts(answer, len(golds)) if rule.multiple else [answer]
    if rule.multiple and len(answers) != len(golds):
        return False, f"{len(answers)} answers, not {len(golds)}"

    def equal(answer: str, gold: str) -> bool:
        verdict = quick(answer, gold, rule)
        return verdict[0] if verdict else _same(answer, gold, rule)

    if matched(answers, golds, equal):
        return True, "equal by math-verify"
    if not all(readable(part) for part in golds):
        return None, "the gold answer does not parse"  # other texts may well mean the same
    read = all(algebra.readings(part) for part in answers)
    return False, "different by math-verify" if read else "the answer does not parse"


def _same(answer: str, gold: str, rule: Rule) -> bool:
    """Equality by algebra, of what the two say: intervals for inequalities, and all of an equation."""
    ranges = as_intervals(answer), as_intervals(gold)
    if all(ranges):
        (name, answer), (gold_name, gold) = ranges  # type: ignore[misc]
        if name and gold_name and name != gold_name:
            return False
    ratios = ratio(answer), ratio(gold)
    if (ratios[0] is None) != (ratios[1] is None):
        answer, gold = ratios[0] or answer, ratios[1] or gold
    sides, gold_sides = cut_at_equals(answer), cut_at_equals(gold)
    equations = [
        len(each) > 1 and not OTHER_RELATION.search(text) and len(cut(text)) == 1
        for each, text in ((sides, answer), (gold_sides, gold))
    ]
    if equations[0] and equations[1]:
        left, right, gold_left, gold_right = sides[0], sides[-1], gold_sides[0], gold_sides[-1]
        if left.strip() != gold_left.strip() and not re.search("[A-Za-z]", right + gold_right):
            names = [left.strip(), gold_left.strip()]
            if all(re.fullmatch("[A-Za-z]", name) for name in names):
                return False  # x=2 against y=2
        called = [re.fullmatch(r"\s*[A-Za-z]\([A-Za-z]\)\s*", name) for name in (left, gold_left)]
        if len(sides) == len(gold_sides) == 2 and sum(map(bool, called)) == 1:
            named, name = (gold_left, left) if called[1] else (left, gold_left)
            if re.fullmatch(r"\s*[A-Za-z]\s*", name) and name.strip() not in named:
                return algebra.equal(right, gold_right, rule)  # y = 2x and f(x) = 2x
    elif (equations[0] and value(answer) is None) or (equations[1] and value(gold, strict=True) is None):
        return False
    return algebra.equal(answer, gold, rule)


def readable(gold: str) -> bool:
    """Whether a reference answer can be compared with anything but its own text."""
    return (
        number(without_unit(squeezed(gold))) is not None
        or letter(gold) is not None
        or any(not isinstance(reading, str) for reading in algebra.readings(gold))
    )
