"""The made-up task: the same for the same seed, right where it says so, wrong as often as asked, and long-tailed."""

import random
import re
from collections import Counter
from itertools import islice

import pytest

from capo_rl.tasks.arithmetic import WORDS, chain, problems

ROWS = 2000
STEP = re.compile(r"(\d)([+-])(\d)=(\d) ([a-z]+)\n")


def steps(row):
    """The lines of a solution, as (value, sign, digit, result, word)."""
    return STEP.findall(row["solution"])


def test_a_seed_is_a_stream():
    assert list(islice(problems(3), 50)) == list(islice(problems(3), 50))
    assert list(islice(problems(3), 50)) != list(islice(problems(4), 50))


@pytest.mark.parametrize("terms", [2, 5, 8])
def test_solutions_come_to_the_answer(terms):
    for row in islice(problems(1, terms), 200):
        expression = row["problem"].removeprefix("Compute ").removesuffix(" mod 10.\n")
        assert len(re.findall(r"\d", expression)) == terms
        assert row["answer"] == str(eval(expression) % 10)
        assert row["solution"].endswith(f"\n\\boxed{{{row['answer']}}}")
        assert len(steps(row)) == terms - 1


def test_too_few_terms():
    with pytest.raises(ValueError, match="terms=1"):
        problems(0, terms=1)


def test_slips_are_as_frequent_as_asked_and_spare_the_answer():
    rows = list(islice(problems(0, slip=0.16), ROWS))
    wrong = [eval(a + sign + b) % 10 != int(c) for row in rows for a, sign, b, c, _ in steps(row)]
    assert sum(wrong) / len(wrong) == pytest.approx(0.16, abs=0.02)  # five standard deviations
    right = [row["solution"].endswith(f"{{{row['answer']}}}") for row in rows]
    assert sum(right) / len(right) == pytest.approx(0.84**4, abs=0.06)  # two slips can cancel
    assert all(eval(row["problem"][8:-9]) % 10 == int(row["answer"]) for row in rows)


def test_a_slip_goes_on():
    text, value = chain(random.Random(0), [1, 2, 3], ["+", "-"], slip=1.0)
    (first, second) = STEP.findall(text)
    assert first[3] == second[0] != "3"
    assert text.endswith(f"\\boxed{{{value}}}")


def test_words_follow_zipfs_law():
    assert len(set(WORDS)) == len(WORDS) == 480
    counts = Counter(step[4] for row in islice(problems(0), ROWS) for step in steps(row))
    harmonic = sum(1 / rank for rank in range(1, len(WORDS) + 1))
    for rank in (1, 2, 4, 8, 16):
        expected = 4 * ROWS / (rank * harmonic)
        assert counts[WORDS[rank - 1]] == pytest.approx(expected, abs=5 * expected**0.5)
    tail = sum(counts[word] for word in WORDS[240:]) / counts.total()
    assert tail == pytest.approx(0.102, abs=0.02)  # half of the words are a tenth of the text
