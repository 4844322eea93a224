"""The reward for a right answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from capo_rl.rewards import grading


def accuracy_reward(
    completions: Sequence[Any],
    answer: Sequence[str],
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""TRL reward: 1.0 where the boxed answer equals `answer`, 0.0 where not, `None` if it can't be graded.

    Each answer has 5 seconds of processor time. Logs how many answers of this batch timed out, how many had to be
    graded twice as the machine was busy, and how many could not be graded (time-outs among them).

    >>> accuracy_reward([r"$\boxed{4}$", [{"role": "assistant", "content": r"\boxed{5}"}]], ["4", "4"])
    [1.0, 0.0]
    """
    grader = grading.shared_grader()
    overloaded = grader.overloaded
    verdicts = grader.grade_all([completion_text(completion) for completion in completions], answer)
    if log_metric is not None:
        log_metric("grader/timeouts", float(sum(v.reason == grading.TIMED_OUT for v in verdicts)))
        log_metric("grader/overloaded", float(grader.overloaded - overloaded))
        log_metric("grader/ungradable", float(sum(v.correct is None for v in verdicts)))
    return [verdict.reward for verdict in verdicts]


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """The text of a completion: its own, or that of a conversation's last message.

    >>> completion_text([{"role": "assistant", "content": "4"}])
    '4'
    """
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    return content if isinstance(content, str) else ""
