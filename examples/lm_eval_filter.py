"""The grader as a filter of lm-evaluation-harness: a completion whose answer is right becomes the reference answer.

Import this file before the evaluation (a task's `utils.py` may), and name the filter in the task's YAML; then the
metric `exact_match` counts what the grader accepts.

    doc_to_target: answer
    filter_list:
      - name: capo
        filter: [{function: capo, gold: answer}, {function: take_first}]
    metric_list: [{metric: exact_match}]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval.api.filter import Filter
from lm_eval.api.registry import register_filter

from capo_rl.answers import Rule
from capo_rl.rewards.grading import shared_grader


@register_filter("capo")
class CapoFilter(Filter):
    """`gold` is the document's column with the reference answer, `kind` one of `capo_rl.answers.KINDS`."""

    def __init__(self, gold: str = "answer", kind: str = "math") -> None:
        self.gold = gold
        self.rule = Rule(kind, fallbacks=True)

    def apply(self, resps: Iterable[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
        return [
            [self._graded(text, str(doc[self.gold])) for text in texts] for texts, doc in zip(resps, docs, strict=True)
        ]

    def _graded(self, text: str, gold: str) -> str:
        verdict = shared_grader().grade(text, gold, self.rule)
        return gold if verdict.correct else f"[{verdict.reason}] {verdict.extracted}"
