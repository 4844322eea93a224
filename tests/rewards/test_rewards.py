"""Reward functions that fail: on a batch, on every batch, awaited or not."""

from __future__ import annotations

import asyncio
import functools
import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from capo_rl import CAPOConfig, CAPOTrainer
from capo_rl.rewards.guarded import guarded


def test_results_pass_through():
    def reward(completions, **kwargs):
        """Say what it does."""
        return [1, 0.5, None, True]

    wrapped = guarded(reward)
    assert wrapped(completions=list("abcd"), prompts=None, self="a column") == [1, 0.5, None, True]
    assert (wrapped.missing, wrapped.error) == (0, None)
    assert (wrapped.__name__, wrapped.__doc__) == ("reward", "Say what it does.")
    assert guarded(functools.partial(reward)).__name__ == "reward"


@pytest.mark.parametrize("returned", [torch.tensor([1.0, 0.5]), np.array([1.0, 0.5]), iter([1, 0.5])], ids=type)
def test_any_kind_of_number_will_do(returned):
    assert guarded(lambda completions: returned)(completions=["a", "b"]) == [1.0, 0.5]


def test_what_is_not_finite_is_missing_for_its_own_completion():
    wrapped = guarded(lambda completions: [math.nan, math.inf, -math.inf, 10**400, 2.0])
    assert wrapped(completions=list("abcde")) == [None, None, None, None, 2.0]
    assert wrapped.missing == 4


def failing(completions, **kwargs):
    raise KeyError("a bug")


async def failing_when_awaited(completions, **kwargs):
    await asyncio.sleep(0)
    raise KeyError("a bug")


class Judge:
    async def __call__(self, completions, **kwargs):
        raise KeyError("a bug")


def called(reward, completions):
    returned = reward(completions=completions)
    return asyncio.run(returned) if asyncio.iscoroutine(returned) else returned


@pytest.mark.parametrize("reward", [failing, failing_when_awaited, Judge()], ids=["plain", "async", "async class"])
def test_a_batch_that_raises_is_missing_and_told_once_with_its_traceback(caplog, reward):
    wrapped = guarded(reward)
    for _ in range(2):
        assert called(wrapped, ["a", "b"]) == [None, None]
    assert (wrapped.missing, wrapped.error) == (4, "KeyError: 'a bug'")
    (record,) = caplog.records
    assert "the 2 completions of this batch have no reward of it" in record.getMessage()
    assert 'raise KeyError("a bug")' in caplog.text


def test_a_batch_that_raises_is_not_tried_again():
    calls = []
    guarded(lambda completions: calls.append(completions) or failing(completions))(completions=["a", "b"])
    assert calls == [["a", "b"]]


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        ([1.0], "ValueError: it returned 1 rewards for 2 completions"),
        ([1.0] * 3, "ValueError: it returned 3 rewards for 2 completions"),
        (["1.0", "0.0"], "TypeError: the reward '1.0' is a str, not a number"),
        ([1.0, [2.0]], r"TypeError: the reward \[2.0\] is a list, not a number"),
        ("10", "TypeError: it returned '10', not a list of one number or None for each completion"),
        (None, "TypeError: it returned None, not a list"),
        (1.0, "TypeError: it returned 1.0, not a list"),
    ],
    ids=str,
)
def test_what_are_no_rewards_fails_the_batch(caplog, returned, error):
    wrapped = guarded(lambda completions: returned)
    assert wrapped(completions=["a", "b"]) == [None, None]
    assert wrapped.missing == 2
    assert wrapped.error.startswith(error.replace("\\", ""))


def test_a_batch_that_works_forgets_the_error():
    returned = [[1.0], [1.0, 2.0]]
    wrapped = guarded(lambda completions: returned.pop(0))
    assert [wrapped(completions=["a", "b"]) for _ in range(2)] == [[None, None], [1.0, 2.0]]
    assert wrapped.error is None


def test_an_interrupt_is_not_hidden():
    def reward(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guarded(reward)(completions=["a"])


# ---- in the trainer ----------------------------------------------------------------------------------------------


def test_a_failed_batch_trains_nothing_and_is_counted(build, caplog):
    batches = []

    def broken(completions, log_metric, log_extra, **kwargs):
        batches.append(len(completions))
        log_metric("judged", 1.0)
        log_extra("length", [len(text) for text in completions])
        if len(batches) in (1, 3):
            raise ZeroDivisionError
        return [float(i) for i in range(len(completions))]

    trainer = build(rewards=broken, capo_mode="monitor", max_steps=4)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert batches == [8] * 4  # a judge is called once a batch
    assert [entry["capo/rewards_missing"] for entry in entries] == [8, 0, 8, 0]
    assert [entry["judged"] for entry in entries] == [1.0] * 4
    assert [entry["grad_norm"] > 0 for entry in entries] == [False, True, False, True]
    assert len(trainer._logs["extra"]["length"]) == len(trainer._logs["prompt"])


def nothing(completions, **kwargs):
    return [None] * len(completions)


@pytest.mark.parametrize("mode", ["trust_region", "mask", "monitor", "off"])
@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (failing, "failing: KeyError: 'a bug'"),
        (failing_when_awaited, "failing_when_awaited: KeyError: 'a bug'"),
        (nothing, "nothing: None or NaN for every completion"),
        ([failing, nothing], "failing: KeyError: 'a bug'; nothing: None or NaN for every completion"),
    ],
    ids=["raises", "async", "none", "both"],
)
def test_three_batches_without_any_reward_end_the_run(build, mode, rewards, message):
    trainer = build(rewards=rewards, capo_mode=mode, max_steps=5)
    with pytest.raises(RuntimeError, match="no completion of 3 batches in a row has a reward.*" + message):
        trainer.train()
    assert trainer.state.global_step == 2


def test_one_reward_of_two_is_enough(build):
    trainer = build(rewards=[failing, lambda completions, **kwargs: list(range(len(completions)))], max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.reward_funcs[0].missing == 32


@pytest.mark.parametrize("column", ["prompts", "completions", "trainer_state", "log_extra", "log_metric"])
def test_a_column_that_a_reward_function_would_get_twice_is_refused(tmp_path, column):
    data = Dataset.from_list([{"prompt": "w1", column: "x"}])
    args = CAPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    for name in ("train_dataset", "eval_dataset"):
        with pytest.raises(ValueError, match=f"the data has a column `{column}`.*rename"):
            CAPOTrainer("a model that would be looked for", nothing, args, **{name: data})
