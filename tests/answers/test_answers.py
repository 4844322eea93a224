"""Where an answer is found, and which answers are equal."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capo_rl.answers import (
    Number,
    Rule,
    extract_answer,
    final_text,
    letter,
    matched,
    number,
    parts,
    quick,
    readable,
    squeezed,
    stated_answer,
    without_unit,
)
from capo_rl.rewards.grading import TIMED_OUT, Grader, Verdict


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2, deadline=3.0) as grader:
        yield grader


# --- where the answer is


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 42", "42"),
        ("#### 1\n#### 1,234 \n", "1,234"),
        ("The answer is 42.", "42."),
        ("The final answer is: $\\frac{1}{2}$", "$\\frac{1}{2}$"),
        ("So.\n**Answer:** C\n\n", "C"),
        ("ANSWER: (B)", "(B)"),
        ("The answer is not 5; the answer is 6", "6"),
        ("The answer is 42.\nOr is it?", None),
        ("It is 42.", None),
        ("My answers: 42", None),
        ("The answer is", None),
        ("The answer is: ", None),
        ("The answer is 5, so the answer is:", None),
        ("The answer isn't 5", None),
        ("The answer is **42**.", "42."),
        ("#### **42**", "42"),
        ("The answer is 2 ** 3", "2 ** 3"),
        ("Final Answer: The final answer is $x=3$. I hope it is correct.", "$x=3$."),  # Minerva's prompt
        ("The answer is $2.5.$ So that is it", "$2.5."),
        ("The answer is $x^2$, which is even", "$x^2$"),
        ("The answer is 5 because x = 3", "5"),
        ("The answer is 13, but we need more", "13, but we need more"),
        (r"The answer is \(3\).", "3"),
        (r"The answer is \(1\) and \(2\)", r"\(1\) and \(2\)"),
        ("see ####", None),
        ("", None),
    ],
)
def test_stated_answer(text, answer):
    assert stated_answer(text) == answer


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("no marks", "no marks"),
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),  # the prompt opened the reasoning
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>a", ""),
        ("a<think>b", "a"),
        ("a<think>b</think>", ""),
    ],
)
def test_final_text(completion, text):
    assert final_text(completion) == text


def test_an_answer_in_the_reasoning_does_not_count():
    grader = Grader()
    rule = Rule(fallbacks=True)
    for text in (
        r"<think>\boxed{4}</think>Clearly.",
        r"\boxed{4}</think>",
        r"<think>\boxed{4}",
        "The answer is 4</think>",
    ):
        assert grader.grade(text, "4", rule).correct is False
    assert "reasoning" in grader.grade(r"<think>\boxed{4}</think>Clearly.", "4", rule).reason
    assert grader.grade(r"<think>\boxed{5}</think>So \boxed{4}", "4", rule).correct is True
    assert grader.grade("<think>" + "hm " * 9000 + r"\boxed{4}", "4", rule).correct is False  # longer than what is read


def test_fallbacks_are_for_the_rules_that_ask_for_them():
    grader = Grader()
    for text in ("#### 4", "The answer is 4."):
        assert grader.grade(text, "4") == Verdict(False, "no boxed answer")
        assert grader.grade(text, "4", Rule(fallbacks=True)).correct is True
    assert grader.grade("\\boxed{5}\n#### 4", "4", Rule(fallbacks=True)).correct is False  # the box comes first


def test_an_empty_box_hides_no_stated_answer():
    grader = Grader()
    text = "I put it within \\boxed{}.\nThe answer is 4."  # as a model repeats the question
    assert grader.grade(text, "4", Rule(fallbacks=True)).correct is True
    assert grader.grade(text, "4") == Verdict(False, "empty box", "")
    assert grader.grade("\\boxed{}", "4", Rule(fallbacks=True)) == Verdict(False, "empty box", "")


@pytest.mark.parametrize("unit", ["answer is ", "####", "answer", "answer*", "****", "\n####", "<think>", "</think>"])
def test_fallbacks_are_linear(unit):
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    Grader().grade(text, "1", Rule(fallbacks=True))
    assert time.process_time() - start < 3


# --- numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-17", -17),
        ("+2", 2),
        ("−3", -3),
        ("007", 7),
        ("1,234,567", 1234567),
        (r"10,\!080", 10080),
        ("58{,}500", 58500),
        (".5", Fraction(1, 2)),
        ("12.", 12),
        ("4.5e33", 45 * 10**32),
        ("1E-2", Fraction(1, 100)),
        (r"4.5 \times 10^{33}", 45 * 10**32),
        (r"-6\cdot 10^{-2}", Fraction(-6, 100)),
        ("3 × 10^2", 300),
        ("10^{3}", 1000),
        ("-10^{-3}", Fraction(-1, 1000)),
        (r"\frac{1}{2}", Fraction(1, 2)),
        (r"-\dfrac{35}{9}", Fraction(-35, 9)),
        (r"\frac43", Fraction(4, 3)),
        (r"\frac 34", Fraction(3, 4)),
        (r"\frac9{19}", Fraction(9, 19)),
        (r"\frac{-1}{1997}", Fraction(-1, 1997)),
        ("-1./3", Fraction(-1, 3)),
        ("1/3", Fraction(1, 3)),
        (r"\$18.90", Fraction(189, 10)),
        ("-$3", -3),
        ("€5", 5),
        (r"90^\circ", 90),
        (r"18.8^{\circ}", Fraction(188, 10)),
        ("45°", 45),
        (r"\textbf{(073)}", 73),
        ("(5)", 5),
    ],
)
def test_number(text, value):
    assert number(text).value == value


@pytest.mark.parametrize(
    "text",
    ["", "1 2", "x", "2k", "1,23", "1,2345", "--1", "1/0", r"\frac{1}{0}", "1.2.3", "٣", "１", "1²", "(1,234)",
     "1e9999", "9" * 301, "52_8", r"\pi", "2^{10}", "1-2", "0x10", "1_000", "inf", "nan", "1e", "$", "%"],
)  # fmt: skip
def test_what_is_no_number(text):
    assert number(text) is None


@given(value=st.decimals(-(10**12), 10**12, allow_nan=False, places=6))
def test_decimals_are_exact(value):
    for text in (f"{value:f}", f"{value:,f}", f"{value:e}"):
        assert number(text).value == Fraction(value)


@given(text=st.text(alphabet="0123456789.,-+eE^{}()\\$%/ fractimes", max_size=30))
def test_text_is_a_number_or_not_but_no_error(text):
    found = number(text)
    assert found is None or isinstance(found, Number)
    for rule in (Rule(), Rule("number"), Rule("letter")):
        verdict = quick(text, "12", rule)
        assert verdict is None or isinstance(verdict[0], bool)


# --- equality without algebra


@pytest.mark.parametrize(
    ("answer", "gold", "rule", "correct"),
    [
        # integers and decimals
        ("0.5", r"\frac{1}{2}", Rule(), True),
        ("0.333333", "1/3", Rule(), True),
        ("0.3333", "1/3", Rule(), False),
        ("1234567.5", "1234567", Rule(), False),
        ("2e-8", "1e-8", Rule(), False),
        ("3.61e-10", "3.61000001e-10", Rule(), True),
        ("204.0", "204", Rule("integer"), True),
        ("203.9999999", "204", Rule("integer"), False),
        ("033", "33", Rule("integer"), True),
        (r"m+n=\textbf{204}", "204", Rule("integer"), True),
        (r"\frac{408}{2}", "204", Rule("integer"), True),
        # currency, commas and units
        (r"\$1,234.00", "1234", Rule("number"), True),
        ("18 dollars", "18", Rule("number"), True),
        (r"18 \text{ eggs per day}", "18", Rule("number"), True),
        (r"5 \text{ million}", "5", Rule("number"), False),
        ("5 million dollars", "5,000,000", Rule("number"), True),
        (r"\frac{41}{12} \text{ km}", r"\frac{41}{12}", Rule(unit="km"), True),
        ("166 cm^2", "166", Rule(unit="$cm^2$"), True),
        ("45 minutes", "45", Rule(unit="minute"), True),
        (r"4^{\circ}", "4", Rule(), True),
        (r"4.5 \times 10^{33} \mathrm{~erg} \cdot \mathrm{s}^{-1}", "4.5e33", Rule(), True),
        (r"5\,\mu\mathrm{m}", "5", Rule(), True),
        # percent
        (r"62.5\%", "62.5%", Rule(), True),
        ("62.5", "62.5%", Rule(), True),
        ("0.625", "62.5%", Rule(), True),
        ("50%", "0.5", Rule(), True),
        ("50", "0.5", Rule(), False),
        # tolerance
        ("4.25", "4.2", Rule(tolerance=0.1), True),
        ("4.3", "4.2", Rule(tolerance=0.1), True),
        ("4.31", "4.2", Rule(tolerance=0.1), False),
        ("5", "4", Rule(tolerance=1), True),
        (r"4.1\%", "4.2", Rule(tolerance=0.1, unit="%"), True),
        ("9.6004", "9.6", Rule(relative=1e-4), True),
        ("9.61", "9.6", Rule(relative=1e-4), False),
        ("1.39e-10", "3.61e-10", Rule(relative=1e-4), False),
        # letters
        ("(C)", "C", Rule("letter"), True),
        (r"\text{C}", "C", Rule("letter"), True),
        ("c", "C", Rule("letter"), True),
        ("C. 5 eV", "C", Rule("letter"), True),
        ("B", "C", Rule("letter"), False),
        ("С", "C", Rule("letter"), False),  # a Cyrillic one
        ("A, B, C", "C", Rule("letter"), False),
        ("ABCD", "C", Rule("letter"), False),
        # words
        ("Evelyn", r"\text{Evelyn}", Rule(), True),
        (r"\text{odd}", r"\text{even}", Rule(), False),
        (r"\text{seat}", r"\text{east}", Rule(), False),
        # looks
        (r"\left( 3, \dfrac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", Rule(), True),
    ],
)
def test_quick(answer, gold, rule, correct):
    verdict = quick(answer, gold, rule)
    assert verdict is not None and verdict[0] is correct, verdict


@pytest.mark.parametrize("kind", ["number", "integer"])
def test_words_that_change_a_number_are_no_unit(grader, kind):
    for answer in ("5 or six", "5 and a half", "5 dozen", "5 hundred", "5 but not yet", "5, but", "5, x", "5, 6"):
        assert grader.grade(f"\\boxed{{{answer}}}", "5", Rule(kind)).correct is False, answer
    for answer in ("5 dollars", "$5$ dollars", "5% more", "5 men and women", "4 + 1 = 5 inches"):
        assert grader.grade(f"\\boxed{{{answer}}}", "5", Rule(kind)).correct is True, answer


@pytest.mark.parametrize("filler", [" ", ". ", ".$", "**", ", ", r"\(", r"\)", "a", ", which"])
def test_a_stated_answer_is_found_in_linear_time(filler):
    text = "The answer is 5" + filler * (1_000_000 // len(filler)) + "x"
    start = time.process_time()
    stated_answer(text)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("answer", "gold"), [("x+1", "1+x"), (r"\frac{\pi}{2}", "1.57"), ("(1,2)", "(1,3)"), ("6", "6m"), ("1 2", "12")]
)
def test_quick_leaves_algebra_alone(answer, gold):
    assert quick(answer, gold, Rule()) is None


def test_a_space_after_a_comma_makes_a_list():
    assert number("32, 349") is None
    assert number(r"32,\! 349") == number("32,349") == number("32349")
    assert quick("32349", "32, 349", Rule()) is None


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="kind='set'"):
        Rule("set")


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        (r"5.4 \text{ cents}", "5.4"),
        (r"15\mbox{ cm}^2", "15"),
        (r"3\,\mathrm{J\,s^{-1}}", "3"),
        (r"3 \mathrm{kg} \cdot \mathrm{m}^{2}/\mathrm{s}", "3"),
        (r"\text{east}", r"\text{east}"),
        (r"2 \text{ or } 3", r"2 \text{ or } 3"),
        (r"2\mathrm{i}", r"2\mathrm{i}"),
        (r"2 \text{ and } \text{3}", r"2 \text{ and } \text{3}"),
    ],
)
def test_without_unit(text, rest):
    assert without_unit(text) == rest


def test_squeezed_keeps_digits_apart():
    assert squeezed("1 2") != squeezed("12")
    assert squeezed(r"\pi r") != squeezed(r"\pir")


def test_letter_is_one_letter():
    assert [letter(t) for t in ("A", "(d)", r"\textbf{(B)}", "**C**", "A. x", "", "AB", "A dog", "1")] == [
        *"ADBCA", None, None, None, None,
    ]  # fmt: skip


# --- several answers


@pytest.mark.parametrize(
    ("text", "expected", "found"),
    [
        ("1,-2", None, ["1", "-2"]),
        ("(1,8,19), (2,7,13)", None, ["(1,8,19)", "(2,7,13)"]),
        (r"\{1,\, 3;\; 5\}", None, ["1", "3", "5"]),
        (r"x = \pm \sqrt{2}", None, [r"+\sqrt{2}", r"-\sqrt{2}"]),
        (r"x=1 \text{ or } x=2", None, ["1", "2"]),
        ("1; 2 and 3", None, ["1", "2", "3"]),
        ("2,400, 1,350, 864", 3, ["2400", "1350", "864"]),
        ("2,400", 2, ["2", "400"]),
        (r"\left(\frac{1}{2}, 3\right)", 1, [r"(\frac{1}{2}, 3 )"]),
        ("", None, []),
        (")))(((", 1, [")))((("]),
    ],
)
def test_parts(text, expected, found):
    assert parts(text, expected) == found


def test_matched_uses_each_answer_once():
    def equal(a, b):
        return a == b

    assert matched(list("abca"), list("caab"), equal)
    assert not matched(list("aab"), list("abb"), equal)
    assert not matched(list("ab"), list("aab"), equal)


# --- with algebra: what each set needs

M = Rule(multiple=True)
R = Rule(relative=1e-4)


@pytest.mark.parametrize(
    ("answer", "gold", "rule", "correct"),
    [
        # OlympiadBench: lists, tuples, intervals, a tolerance
        (r"-1, \frac{-3}{2}, 0", r"0,-1,-\frac{3}{2}", M, True),
        ("-1, 0", r"0,-1,-\frac{3}{2}", M, False),
        ("-2", "-2,-2", M, False),
        ("-2, -2", "-2,-2", M, True),
        (r"\pm 1, \pm 7", "1,-1,7,-7", M, True),
        (r"\frac{3 \pm \sqrt{21}}{2}, 1", r"1,\frac{3 + \sqrt{21}}{2},\frac{3 - \sqrt{21}}{2}", M, True),
        (r"(3,4,3), (2,\sqrt{4},2)", "(2,2,2),(3,4,3)", M, True),
        ("(4,3,3), (2,2,2)", "(2,2,2),(3,4,3)", M, False),
        (r"f(x)=x+1 \text{ and } f(x)=-1", "f(x)=-1,f(x)=x+1", M, True),
        ("f(x)=x+2, f(x)=-1", "f(x)=-1,f(x)=x+1", M, False),
        (r"60^{\circ}, 90^{\circ}", r"90^{\circ},60^{\circ}", M, True),
        (r"-1 \le x \le -\frac12", r"[-1,-\frac{1}{2}]", Rule(), True),
        ("(-1,-0.5]", r"[-1,-\frac{1}{2}]", Rule(), False),
        (r"(-\infty,0)\cup\{1\}", r"(-\infty, 0) \cup\{1\}.", Rule(), True),
        (r"2.1+\sqrt{4}", "4", Rule(tolerance=0.11), True),
        (r"2.2+\sqrt{4}", "4", Rule(tolerance=0.11), False),
        # MinervaMath: units, scientific notation, equations, its own spelling
        (r"\sqrt{5}", "2.236", R, True),
        (r"\sqrt{5}", "2.23", R, False),
        (r"\pi \cdot 10^{-9}", r"2\pi \cdot 10^{-9}", R, False),
        (r"\arcsin(10/13)", "np.arcsin(10/13)", R, True),
        (r"\frac{e^{at}-e^{-at}}{2a}", r"\frac{1}{2a}(\exp{a*t} - \exp{-a*t})", R, True),
        (r"m \dot v+bv=f", r"m \frac{d v}{d t}+b v=f", R, True),
        ("y'+ry=rx(t)", r"y^{\prime}+r y-r x(t)=0", R, True),
        ("y'+ry=2rx(t)", r"y^{\prime}+r y-r x(t)=0", R, False),
        (r"x^2 + y = 0", "0", R, False),
        (r"y + x^2 = 0", "x^2+y=0", R, True),
        ("SRMC = MR", "MR=SRMC", R, True),
        ("SRMC = LRMC", "MR=SRMC", R, False),
        ("6", "6m", R, False),
        (r"\frac{c}{\sqrt{2}}", r"\frac{1}{\sqrt{2}}c", R, True),
        ("1/\\sqrt{2}", r"\frac{1}{\sqrt{2}}c", R, False),
        # and MATH
        ("3(1/3)", "1", Rule(), True),
        ("-1+1", "0", Rule(), True),
        ("k=3", "3", Rule(), True),
        ("a+b=3", "3", Rule(), True),
        (r"\gamma(x) + 1", r"1 + \gamma(x)", Rule(), True),
        (r"5 \text{ million}", "5", Rule(), False),
        (r"(a+1)^2", "a^2+2a+1", Rule(), True),
        (r"1\frac{4}{5}", "1.8", Rule(), True),
        ("2^{10}", "1024", Rule("integer"), True),
    ],
)
def test_algebra(grader, answer, gold, rule, correct):
    verdict = grader.grade(f"\\boxed{{{answer}}}", gold, rule)
    assert verdict.correct is correct, verdict
    assert verdict.extracted == extract_answer(f"\\boxed{{{answer}}}")


def test_a_list_with_an_answer_that_hangs_is_a_time_out():
    with Grader(workers=1, deadline=1.0) as grader:
        verdict = grader.grade(r"\boxed{1, 10^{10^{10}}}", "1, 2", M)
    assert (verdict.correct, verdict.reason) == (None, TIMED_OUT)


def test_readable():
    assert [gold for gold in ("12", r"\$5", "C", "x+1", "t(0,4]", "E_{1}", "x^", "}{", "") if readable(gold)] == [
        "12", r"\$5", "C", "x+1", "t(0,4]", "E_{1}",
    ]  # fmt: skip
