"""The grader as a reward function of verl, which loads it from this file.

    reward.custom_reward_function.path=examples/verl_reward.py reward.custom_reward_function.name=compute_score

These are verl 0.9's names; before it, they had no `reward.`. The ground truth is the reference answer.
Each answer has 5 seconds of processor time and 2 GiB; one that can't be graded has the score 0 and says so.
"""

from __future__ import annotations

from typing import Any

from capo_rl.rewards.grading import shared_grader


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, Any]:
    """The score of one completion; verl logs the other values."""
    verdict = shared_grader().grade(solution_str, ground_truth)
    return {"score": verdict.reward or 0.0, "acc": verdict.correct is True, "graded": verdict.correct is not None}
