"""Sentences with given words: a task that a language model of 135 million weights can learn, checked by a program.

A problem names one to three nouns that a short sentence must contain. SmolLM2-135M-Instruct does it for one in nearly
half of its samples and for three in an eighth, so that a group of samples has advantages.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

_IN_TRAINING = """
river engine teacher winter garden letter market planet bridge doctor forest kitchen mountain window island camera
farmer guitar hotel jacket ladder museum needle ocean painter rabbit shadow tower village wagon yard zebra
"""
_HELD_OUT = "candle desert eagle factory glacier hammer lantern mirror orchard pilot queen station"
NOUNS, HELD_OUT_NOUNS = tuple(_IN_TRAINING.split()), tuple(_HELD_OUT.split())
# Of nothing that the task is about: what becomes of the answers to these is what becomes of the language.
QUESTIONS = (
    "What is the capital of France?",
    "How do plants make their food?",
    "Why is the sky blue?",
    "Give me one tip for sleeping better.",
    "What does a carpenter do?",
    "Explain in two sentences what gravity is.",
    "How do I boil an egg?",
    "What is the difference between a lake and the sea?",
    "Name three fruits.",
    "Why do people keep dogs?",
    "What is a prime number?",
    "How does a bicycle stay upright?",
    "Tell me a fact about the moon.",
    "What should I pack for a cold day?",
    "Who wrote Romeo and Juliet?",
    "What is bread made of?",
)


def sentences(seed: int, *, held_out: bool = False) -> Iterator[dict[str, Any]]:
    """Problems without end, the same for the same seed: `problem`, and `constraints` of `capo_rl.rewards.constraints`.

    >>> made = sentences(seed=0)
    >>> next(made)["problem"]
    'Write one short sentence with the words shadow, teacher and farmer.'
    """
    rng = random.Random(seed)
    nouns = HELD_OUT_NOUNS if held_out else NOUNS
    while True:
        (count,) = rng.choices((1, 2, 3), (3, 2, 1))
        asked = rng.sample(nouns, count)
        yield {
            "problem": f"Write one short sentence with the {listed(asked)}.",
            "constraints": {"contains": asked, "ends_with": "."},
        }


def listed(nouns: list[str]) -> str:
    """What a sentence is asked to contain.

    >>> listed(["river", "engine", "garden"])
    'words river, engine and garden'
    """
    return f"word {nouns[0]}" if len(nouns) == 1 else f"words {', '.join(nouns[:-1])} and {nouns[-1]}"
