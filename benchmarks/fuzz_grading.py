"""Grade answers that were changed at random, and look at what must not happen.

    python benchmarks/fuzz_grading.py FOLDER [--answers 20000] [--seed 0] [--cases FILE ...]

FOLDER holds the benchmarks as JSON Lines; FILE holds cases like those in tests/cases. A character, a piece or a part of
another answer is put in, taken out, doubled or exchanged, one to three times. Ends with an error if a process died of
anything but its deadline, if an answer took longer than the limits allow, or if a number was accepted for another one,
read here apart from the grader.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

from capo_rl.answers import Rule, extract_answer
from capo_rl.evaluation.benchmarks import BENCHMARKS, load_benchmark
from capo_rl.rewards.grading import Grader, Verdict

PIECES = (
    r"\frac", r"\sqrt", r"\text{", r"\pi", r"\infty", r"\pm", r"\cup", r"\%", r"\overline{", r"\{", r"\}", r"\\", r"\,",
    "{", "}", "(", ")", "[", "]", "^", "_", "=", "<", ",", ".", "-", "+", "/", "!", " ", "x", "i", "e", "0", "1", "9",
    "10", "10^{10}", "½", "²", "√", "∞", "−", " or ", " and ", " cm", "percent", "\u0301", "\u202e", "\0",
)  # fmt: skip
_NUMBER = re.compile(r"(-?)(?:\\frac\{([0-9]+)\}\{([0-9]+)\}|([0-9]+)/([0-9]+)|([0-9]+(?:\.[0-9]+)?))")


def simple(text: str) -> Fraction | None:
    """A number in one of three simple forms, read without the grader."""
    found = _NUMBER.fullmatch(text.strip())
    if found is None:
        return None
    sign, a, b, c, d, whole = found.groups()
    above, below = (whole, "1") if whole else (a or c, b or d)
    return None if int(below) == 0 else Fraction(above) / int(below) * (-1 if sign else 1)


def changed(text: str, others: list[str], rng: random.Random) -> str:
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(text))
        end = min(len(text), at + rng.randint(0, 3))
        other = rng.choice(others)
        text = rng.choice(
            [
                text[:at] + rng.choice(PIECES) + text[at:],
                text[:at] + text[end:],
                text[:end] + text[at:],
                text[:at] + rng.choice(PIECES) + text[end:],
                text[:at] + other[rng.randint(0, len(other)) :][:12] + text[at:],
                re.sub(r"[0-9]", lambda _: str(rng.randint(0, 9)), text, count=1),
            ]
        )
    return text


def resident(pid: int) -> float:
    """Mebibytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--answers", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    rng = random.Random(args.seed)
    pairs: list[tuple[str, str, Rule]] = []
    for name in BENCHMARKS:
        if (args.folder / f"{name}.jsonl").exists():
            pairs += [(p.gold, p.gold, p.rule) for p in load_benchmark(name, args.folder)]
    for file in args.cases:
        for case in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            rule = Rule(**{key: case[key] for key in ("kind", "multiple", "relative", "fallbacks")})
            pairs += [(extract_answer(case["completion"]) or case["gold"], case["gold"], rule)] * 4
    others = [answer for answer, _, _ in pairs]
    made = [(changed(answer, others, rng), gold, rule) for answer, gold, rule in rng.choices(pairs, k=args.answers)]

    reasons: Counter[str] = Counter()
    wrong: list[str] = []
    slowest = (0.0, "")
    start = time.monotonic()
    with Grader(workers=2) as grader, ThreadPoolExecutor(2) as threads:

        def grade(one: tuple[str, str, Rule]) -> tuple[Verdict, float]:
            began = time.monotonic()
            return grader.grade(f"\\boxed{{{one[0]}}}", one[1], one[2]), time.monotonic() - began

        for at, (one, (verdict, seconds)) in enumerate(zip(made, threads.map(grade, made), strict=True)):
            reasons["accepted" if verdict.correct else verdict.reason] += 1
            slowest = max(slowest, (seconds, one[0]))
            a, b = simple(verdict.extracted or ""), simple(one[1])
            slack = max(
                Fraction(str(one[2].tolerance or 0)), abs(b or 0) * Fraction(str(one[2].relative or 1e-6)), 10**-6
            )
            if verdict.correct and a is not None and b is not None and abs(a - b) > slack:
                wrong.append(f"{one[1]!a} accepts {verdict.extracted!a}")
            if at % 2500 == 2499:
                processes = [worker._process.pid for worker in list(grader._started) if worker.alive]
                sizes = ", ".join(f"{resident(pid):.0f}" for pid in (os.getpid(), *processes))
                print(f"{at + 1} answers, {time.monotonic() - start:.0f} s, MiB of all processes: {sizes}", flush=True)
        overloaded = grader.overloaded
    print(*(f"    {n} {reason}" for reason, n in reasons.most_common()), sep="\n")
    print(f"the slowest took {slowest[0]:.1f} s ({slowest[1][:80]!a}); {overloaded} were graded twice")
    print(*wrong, sep="\n")
    died = sum(n for reason, n in reasons.items() if "died" in reason)
    print(f"{len(wrong)} numbers accepted for others; {died} processes died")
    sys.exit(bool(wrong or died))


if __name__ == "__main__":
    main()
