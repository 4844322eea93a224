"""Measure the grader on reference answers: themselves, one another, other forms, near misses, and hostile text.

    python benchmarks/grading.py FOLDER [--pairs 20000]

FOLDER holds the benchmarks as JSON Lines. The numbers in docs/evaluation.md are what this prints. It shows reference
answers, never a question.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from capo_rl import answers
from capo_rl.answers import Rule
from capo_rl.evaluation.benchmarks import BENCHMARKS, Problem, load_benchmark
from capo_rl.rewards.grading import TIMED_OUT, Grader

# What a model may write, or somebody who wants the grader to fail: a completion and a reference answer that it isn't.
HOSTILE = {
    "nothing": ("", "1"),
    "white space": (" \n\t\r ", "1"),
    "an empty box": (r"\boxed{}", "1"),
    "a box of spaces": (r"\boxed{ \, \; }", "1/2"),
    "a box without braces": (r"\boxed", "1"),
    "a box that never closes": (r"\boxed{\frac{1}{2}", r"\frac{1}{2}"),
    "a megabyte of opening braces": (r"\boxed" + "{" * 1_000_000, "1"),
    "a megabyte of closing braces": (r"\boxed{1" + "}" * 1_000_000, "2"),
    "a megabyte of braces": (r"\boxed{" + "{}" * 500_000 + "}", "1"),
    "a megabyte of boxes": (r"\boxed{" * 142_857, "1"),
    "a megabyte of backslashes": ("\\" * 1_000_000, "1"),
    "a megabyte of reasoning marks": ("<think>" * 70_000 + "</think>" * 64_000, "1"),
    "a megabyte of digits": (r"\boxed{" + "1" * 1_000_000 + "}", "1"),
    "a megabyte of `answer is`": ("answer is " * 100_000, "1"),
    "a megabyte of hashes": ("####" * 250_000, "1"),
    "8,000 nested braces": (r"\boxed{" + "{" * 4000 + "1" + "}" * 4000 + "}", "1"),
    "nested parentheses": (r"\boxed{" + "(" * 900 + "1" + ")" * 900 + "}", "1/2"),
    "nested square roots": (r"\boxed{" + r"\sqrt{" * 200 + "2" + "}" * 200 + "}", "1/2"),
    "nested fractions": (r"\boxed{" + r"\frac{1}{" * 150 + "2" + "}" * 150 + "}", "1/2"),
    "nested boxes": (r"\boxed{" * 200 + "2" + "}" * 200, "1"),
    "a tower of powers": (r"\boxed{" + "x^" * 900 + "2}", "x"),
    "a number with ten billion digits": (r"\boxed{10^{10^{10}}}", "10"),
    "a larger one": (r"\boxed{9^{9^{9^{9}}}}", "10"),
    "a factorial": (r"\boxed{(10^{9})!}", "10"),
    "a factorial of a factorial": (r"\boxed{((200!)!)!}", "10"),
    "a binomial": (r"\boxed{\binom{10^{9}}{5 \cdot 10^{8}}}", "10"),
    "a long sum": (r"\boxed{\sum_{k=1}^{10^{9}} \frac{1}{k^{k}}}", "10"),
    "a hard integral": (r"\boxed{\int_{0}^{1} \frac{\sin(x^{x})}{\ln(1+x^{\pi})} dx}", "10"),
    "a high root": (r"\boxed{(x+y+z)^{10^{6}}}", "x"),
    "a polynomial to expand": (r"\boxed{(a+b+c+d+e)^{200}-(a+b)^{200}}", "a+1"),
    "NUL": ("\\boxed{\0}", "1"),
    "NUL in a number": ("\\boxed{1\0}", "1/2"),
    "control characters": ("\\boxed{\x01\x02\x1b[31m1\x7f}", "1"),
    "a lone surrogate": ("\\boxed{\ud800}", "1/2"),
    "line separators": ("\\boxed{1\n2\r3\u20284}", "1/2"),
    "a right-to-left override": ("\\boxed{\u202e21}", "12"),
    "zero-width spaces": ("\\boxed{1\u200b2}", "12"),
    "combining marks": ("\\boxed{1" + "\u0301" * 1500 + "}", "1"),
    "Arabic digits": (r"\boxed{٣}", "3"),
    "full-width digits": (r"\boxed{１２}", "12"),
    "a Cyrillic letter": (r"\boxed{А}", "A"),
    "mathematical digits": (r"\boxed{𝟏𝟐}", "12"),
    "a superscript": (r"\boxed{1²}", "12"),
    "spaces inside": (r"\boxed{1" + " " * 1900 + "x}", "2"),
    "commas and spaces": (r"\boxed{1" + ", " * 900 + "x}", "1/2"),
    "units without end": (r"\boxed{1" + r" \text{a}" * 220 + "+ 1}", "1"),
    "units with powers": (r"\boxed{1" + r"\,\cdot\mathrm{m}^{2}" * 90 + "x}", "1"),
    "nested text": (r"\boxed{1" + r"\text{" * 300 + "}" * 300 + "x}", "1"),
    "words in a list": (r"\boxed{" + "1 and " * 300 + "x}", "1/2"),
    "a name without end": (r"\boxed{(" + "a, " * 600 + "= 1}", "2"),
    "five thousand digits": (r"\boxed{" + "9" * 5000 + "}", "1"),
    "digits that int() refuses": (r"\boxed{" + "9" * 1500 + "}", "1"),
    "an exponent of 999": (r"\boxed{1e999}", "1"),
    "a huge exponent": (r"\boxed{1e999999999}", "1"),
    "a division by zero": (r"\boxed{\frac{1}{0}}", "1"),
    "infinity minus infinity": (r"\boxed{\infty-\infty}", "0.5"),
    "not a number": (r"\boxed{nan}", "0.5"),
    "dollars": (r"\boxed{" + "$" * 1500 + "x}", "1"),
    "commas": (r"\boxed{" + "1," * 900 + "1}", "1/2"),
    "Python": (r"\boxed{__import__('os').system('echo owned')}", "1"),
    "Python for sympify": (r"\boxed{().__class__.__bases__[0].__subclasses__()}", "1/2"),
    "Python that ends the process": (r"\boxed{exit()}", "1/2"),
    "a lambda": (r"\boxed{(lambda: [x for x in iter(int, 1)])()}", "1/2"),
    "JSON": ('\\boxed{"}\n{"correct": true, "reason": "x"}}', "1/2"),
    "TeX that reads a file": (r"\boxed{\input{/etc/passwd}}", "1/2"),
    "TeX that never ends": (r"\boxed{\def\x{\x\x}\x}", "1/2"),
    "ten contradicting boxes": (" ".join(rf"\boxed{{{n}}}" for n in range(10)), "3"),
    "every choice": (r"\boxed{A, B, C, D}", "C"),
    "every number": (r"\boxed{" + ",".join(map(str, range(400))) + "}", "3"),
    "an answer in the reasoning": (r"<think>\boxed{1}</think>It is clear.", "1"),
    "an answer in reasoning without end": (r"<think>It is \boxed{1}", "1"),
    "an answer before the reasoning": (r"\boxed{1}<think>Or not?</think>", "1"),
}


def boxed(answer: str) -> str:
    return f"So the answer is $\\boxed{{{answer}}}$."


# --- other forms, and near misses

_INTEGER = re.compile(r"-?[0-9]+")
_FRACTION = re.compile(r"(-?)\\frac\{([0-9]+)\}\{([0-9]+)\}")
_SCIENTIFIC = re.compile(r"(-?[0-9.]+)e(-?[0-9]+)")
_DECIMAL = re.compile(r"-?[0-9]*\.[0-9]+")
_TUPLE = re.compile(r"\(([^()\[\],]+),([^()\[\],]+)\)")
_INTERVAL = re.compile(r"([(\[])([^()\[\],]+),([^()\[\],]+)([)\]])")
_PLAIN = re.compile(r"(?:[0-9a-z+\-*/^{}() ]|\\frac|\\sqrt|\\pi|\\cdot)+")


def forms(gold: str, rule: Rule) -> Iterator[tuple[str, str, bool]]:
    """Answers made from a reference answer: the kind of change, the answer, and whether it is right."""
    if rule.multiple:
        parts = answers.parts(gold)
        yield "the other order", ", ".join(reversed(parts)), True
        yield "the other order", r"\{" + ",".join(reversed(parts)) + r"\}", True
        yield "listed with `and`", r" \text{ and } ".join(parts), True
        if len(parts) > 1:
            yield "one answer left out", ", ".join(parts[1:]), False
        yield "one answer too many", ", ".join([*parts, "12345" if "(" not in gold else "(12345, 6)"]), False
    elif _INTEGER.fullmatch(gold):
        n = int(gold)
        yield "decimals", f"{n}.0", True
        yield "decimals", f"{n}.00", True
        yield "a fraction", rf"\frac{{{2 * n}}}{{2}}", True
        yield "a name", f"x = {n}", True
        yield "a unit", rf"{n} \text{{ cm}}", True
        yield "a unit", rf"{n} \mathrm{{~kg}} \cdot \mathrm{{m}}^{{2}}", True
        yield "currency", rf"\${n}" if n >= 0 else str(n), True
        yield "a sum", f"{n - 1} + 1", True
        if abs(n) >= 1000:
            yield "thousands", f"{n:,}", True
            yield "thousands", f"{n:,}".replace(",", "{,}"), True
            yield "thousands", f"{n:,}".replace(",", r",\!"), True
        yield "another integer", str(n + 1), False
        yield "another integer", str(10 * n + 3), False
        if rule.relative is None or 2 * rule.relative * abs(n) < 0.5:
            yield "a half more", f"{n}.5", False
        yield "a product", rf"{n} \cdot \sqrt{{2}} + 1", False
        if n:
            yield "the other sign", str(-n), False
            yield "another power of ten", rf"{n} \times 10^{{3}}", False
        yield "a variable", f"{n}x + 1", False
        yield "a list", f"{n}, {n + 1}", False
    elif found := _FRACTION.fullmatch(gold):
        sign, (a, b) = found[1], (int(found[2]), int(found[3]))
        yield "a slash", f"{sign}{a}/{b}", True
        yield "a \\dfrac", rf"{sign}\dfrac{{{a}}}{{{b}}}", True
        yield "an unreduced fraction", rf"{sign}\frac{{{3 * a}}}{{{3 * b}}}", True
        yield "a sum", rf"{sign}\left(\frac{{{a}}}{{{2 * b}}}+\frac{{{a}}}{{{2 * b}}}\right)", True
        yield "decimals", f"{sign}{a / b:.12f}", True
        yield "another fraction", rf"{sign}\frac{{{a + 1}}}{{{b}}}", False
        yield "two decimals", f"{sign}{a / b + 0.004:.3f}", False
        if a != b:
            yield "the inverse", rf"{sign}\frac{{{b}}}{{{a}}}", False
        yield "the other sign", rf"{'' if sign else '-'}\frac{{{a}}}{{{b}}}", False
    elif found := _SCIENTIFIC.fullmatch(gold):
        mantissa, power = found[1], int(found[2])
        yield "scientific notation", rf"{mantissa} \times 10^{{{power}}}", True
        yield "scientific notation", rf"{mantissa} \cdot 10^{{{power}}} \text{{ erg/s}}", True
        yield "scientific notation", rf"{mantissa}\times10^{{{power}}}\,\mathrm{{J\,s^{{-1}}}}", True
        yield "scientific notation", f"{mantissa}e{power:+d}", True
        yield "scientific notation", rf"{float(mantissa) / 10:.9g} \times 10^{{{power + 1}}}", True
        yield "another exponent", rf"{mantissa} \times 10^{{{power + 1}}}", False
        yield "another exponent", f"{mantissa}e{-power}", False
        yield "a little more", rf"{float(mantissa) * 1.001:.9g} \times 10^{{{power}}}", False
    elif _DECIMAL.fullmatch(gold):
        yield "a trailing zero", gold + "0", True
        yield "a unit", rf"{gold}\,\mathrm{{m/s}}", True
        yield "scientific notation", rf"{float(gold) * 100:.9g} \times 10^{{-2}}", True
        slack = float(rule.tolerance or 0)
        yield "a little more", f"{float(gold) * 1.001 + slack * 1.1:.9g}", False
        yield "the other sign", f"{-float(gold):.9g}", False
        yield "another power of ten", f"{float(gold) * 10:.9g}", False
    elif (found := _TUPLE.fullmatch(gold)) and "infty" not in gold:
        a, b = found.groups()
        yield "spacing", rf"\left( {a} ,\, {b} \right)", True
        if a.strip() != b.strip():
            yield "the other order", f"({b},{a})", False
        yield "another coordinate", f"({a},{b}+1)", False
        yield "a coordinate more", f"({a},{b},1)", False
        yield "square brackets", f"[{a},{b}]", False
    elif found := _INTERVAL.fullmatch(gold):
        left, a, b, right = found.groups()
        yield "spacing", rf"\left{left}{a} ,\, {b}\right{right}", True
        if "infty" not in a:
            yield "the other bracket", f"{'[' if left == '(' else '('}{a},{b}{right}", False
        if "infty" not in b:
            yield "the other bracket", f"{left}{a},{b}{')' if right == ']' else ']'}", False
    elif gold.endswith((r"^\circ", r"^{\circ}")):
        n = gold.partition("^")[0]
        yield "degrees", n, True
        yield "degrees", rf"{n}^{{\circ}}", True
        yield "degrees", rf"{n} \text{{ degrees}}", True
        yield "degrees", f"{n}°", True
        yield "another angle", rf"{n}1^\circ", False
    elif _PLAIN.fullmatch(gold):
        yield "a factor and its inverse", rf"\frac{{3 \left({gold}\right)}}{{3}}", True
        yield "a sum", f"1 + ({gold}) - 1", True
        yield "one more", f"({gold}) + 1", False
        yield "the other sign", f"-({gold})", False
        yield "twice", f"2 ({gold})", False


# --- measurements


def exceptions(problems: list[Problem], completions: list[str], grader: Grader) -> list[str]:
    verdicts = grader.grade_all(completions, [p.gold for p in problems], [p.rule for p in problems])
    return [
        f"{problem.id}: {verdict.reason}: {verdict.extracted!r}, not {problem.gold!r}"
        for problem, verdict in zip(problems, verdicts, strict=True)
        if verdict.correct is not True
    ]


def solutions(problems: list[Problem], file: Path) -> tuple[list[Problem], list[str]]:
    """The problems whose reference solution holds a box, and these solutions."""
    rows = [json.loads(line) for line in file.read_bytes().rstrip().split(b"\n")]
    pairs = [(p, row["solution"]) for p, row in zip(problems, rows, strict=True) if row["solution"]]
    # `\fbox` is also a frame around a figure's caption; a solution is taken whole, without a limit to its tail.
    pairs = [(p, text) for p, text in pairs if answers.extract_answer(text)]
    return [p for p, _ in pairs], [text for _, text in pairs]


def against_others(problems: list[Problem], limit: int, grader: Grader) -> tuple[int, Counter[str], list[str]]:
    """How many pairs of different problems were graded, their verdicts, and the accepted ones of different text."""
    pairs = list(itertools.permutations(range(len(problems)), 2))
    if len(pairs) > limit:
        pairs = random.Random(0).sample(pairs, limit)
    verdicts = grader.grade_all(
        [boxed(problems[j].gold) for _, j in pairs],
        [problems[i].gold for i, _ in pairs],
        [problems[i].rule for i, _ in pairs],
        progress=True,
    )
    counts: Counter[str] = Counter()
    shown = set()
    for (i, j), verdict in zip(pairs, verdicts, strict=True):
        if verdict.correct is None:
            counts["timed out" if verdict.reason == TIMED_OUT else "unreadable"] += 1
        elif not verdict.correct:
            counts["refused"] += 1
        elif verdict.reason in ("the same text", "the same integer", "the same number"):
            counts[verdict.reason] += 1
        else:
            counts["by algebra"] += 1
            shown.add(f"{problems[i].gold!r} accepts {problems[j].gold!r}")
        if verdict.correct and verdict.reason == "the same number":
            shown.add(f"{problems[i].gold!r} accepts {problems[j].gold!r} (numbers)")
    return len(pairs), counts, sorted(shown)


def throughput(grader: Grader) -> tuple[float, float, float]:
    """Answers a second: by text and numbers alone, by algebra on new text, and on text that was seen before."""

    def rate(pairs: list[tuple[str, str]]) -> float:
        start = time.perf_counter()
        grader.grade_all([boxed(a) for a, _ in pairs], [b for _, b in pairs])
        return len(pairs) / (time.perf_counter() - start)

    rate([(r"\frac{\pi}{2}", r"\pi")] * 8)  # the processes have started
    numbers = [(f"{n:,}.0", str(n)) for n in range(1000, 11000)]
    algebra = [(rf"\frac{{{n}\sqrt{{2}}}}{{2}}", rf"\frac{{{n}}}{{\sqrt{{2}}}}") for n in range(1, 501)]
    return rate(numbers), rate(algebra), rate(algebra)


def hostile() -> None:
    with Grader(workers=1) as grader:
        grader.grade(boxed(r"\pi"), r"\frac{\pi}{2}")  # the process has started
        reasons: Counter[str] = Counter()
        slowest = (0.0, "")
        for what, (text, gold) in HOSTILE.items():
            for rule in (Rule(), Rule("number", fallbacks=True), Rule(multiple=True, relative=1e-4, fallbacks=True)):
                start = time.perf_counter()
                verdict = grader.grade(text, gold, rule)
                slowest = max(slowest, (time.perf_counter() - start, what))
                reasons["accepted" if verdict.correct else verdict.reason] += 1
                if verdict.correct:
                    print(f"    accepted: {what}, {rule}")
        print(f"{len(HOSTILE)} texts, 3 rules each; the slowest took {slowest[0]:.2f} s ({slowest[1]})")
        print(*(f"    {n} {reason}" for reason, n in reasons.most_common()), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=20_000, help="at most so many pairs of problems from each set")
    args = parser.parse_args()
    sets = {name: load_benchmark(name, args.folder) for name in BENCHMARKS if (args.folder / f"{name}.jsonl").exists()}
    with Grader() as grader:
        print(f"# Reference answers ({grader.workers} processes, a deadline of {grader.deadline} s)")
        for name, problems in sets.items():
            wrong = exceptions(problems, [boxed(p.gold) for p in problems], grader)
            told, texts = solutions(problems, args.folder / f"{name}.jsonl")
            wrong_told = exceptions(told, texts, grader)
            print(f"{name}: {len(wrong)} of {len(problems)} not equal to themselves, ", end="")
            print(f"{len(wrong_told)} of {len(told)} not equal to the box of their solution")
            print(*(f"    {line}" for line in wrong + wrong_told), sep="\n", end="\n" if wrong + wrong_told else "")

        print("\n# Other forms and near misses")
        counts: Counter[tuple[str, str, bool]] = Counter()
        bad: list[str] = []
        for name, problems in sets.items():
            made = [(p, *form) for p in problems for form in dict.fromkeys(forms(p.gold, p.rule))]
            verdicts = grader.grade_all(
                [boxed(answer) for _, _, answer, _ in made],
                [p.gold for p, *_ in made],
                [p.rule for p, *_ in made],
            )
            for (problem, what, answer, right), verdict in zip(made, verdicts, strict=True):
                counts[name, "made", right] += 1
                counts[name, "as expected", right] += verdict.correct is right
                if verdict.correct is not right:
                    bad.append(f"{name}: {what}: {answer!r} for {problem.gold!r}: {verdict.correct}, {verdict.reason}")
            accepted, equal = counts[name, "as expected", True], counts[name, "made", True]
            refused, near = counts[name, "as expected", False], counts[name, "made", False]
            print(f"{name}: {accepted} of {equal} equal forms accepted; {refused} of {near} near misses refused")
        print(*(f"    {line}" for line in bad), sep="\n")

        print("\n# Against other problems' reference answers")
        for name, problems in sets.items():
            start = time.perf_counter()
            total, verdict_counts, shown = against_others(problems, args.pairs, grader)
            print(f"{name}: {total} pairs, {dict(verdict_counts)}, {time.perf_counter() - start:.0f} s")
            print(*(f"    {line}" for line in shown), sep="\n", end="\n" if shown else "")

        print(f"\n# Throughput (load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)")
        print("{:.0f} answers a second by numbers, {:.0f} by algebra, {:.0f} again".format(*throughput(grader)))

    print("\n# Hostile text")
    hostile()


if __name__ == "__main__":
    main()
