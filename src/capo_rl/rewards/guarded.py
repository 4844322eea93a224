"""Reward functions that may fail: a batch on which one does has no reward of it, and the run goes on."""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

logger = logging.getLogger(__name__)


class Guarded:
    """A reward function whose failures are `None` instead of the end of the run.

    `missing` counts the completions that got none for it, and `error` says what was wrong with the last batch, if
    anything was.
    """

    def __init__(self, reward_func: Callable[..., Any]) -> None:
        functools.update_wrapper(self, reward_func, updated=())
        named: Any = reward_func
        while isinstance(named, functools.partial):
            named = named.func
        self.__name__ = getattr(named, "__name__", type(named).__name__)
        self.missing = 0
        self.error: str | None = None
        self._reward_func = reward_func
        self._told: set[type[Exception]] = set()

    # A column of the data may have any name, `self` too.
    def __call__(self, /, completions: Sequence[Any], **kwargs: Any) -> Any:
        try:
            return self._checked(self._reward_func(completions=completions, **kwargs), len(completions))
        except Exception as error:
            return self._failed(error, len(completions))

    def _checked(self, returned: Any, count: int) -> list[float | None]:
        if isinstance(returned, str | bytes) or not isinstance(returned, Iterable):
            raise TypeError(f"it returned {returned!r:.60}, not a list of one number or None for each completion")
        rewards = [_number(reward) for reward in returned]
        if len(rewards) != count:
            raise ValueError(f"it returned {len(rewards)} rewards for {count} completions")
        self.error = None
        finite = [None if reward is None or not math.isfinite(reward) else reward for reward in rewards]
        self.missing += sum(after is None and before is not None for before, after in zip(rewards, finite, strict=True))
        return finite

    def _failed(self, error: Exception, count: int) -> list[float | None]:
        self.missing += count
        self.error = f"{type(error).__name__}: {error}"
        if type(error) not in self._told:  # a run's log should not be the same traceback over and over
            self._told.add(type(error))
            logger.warning(
                "reward function %s failed, and the %d completions of this batch have no reward of it; so it will be "
                "wherever it fails: %s",
                self.__name__,
                count,
                self.error,
                exc_info=error,
            )
        return [None] * count


class GuardedAsync(Guarded):
    """The same for an async function, which fails when it is awaited."""

    async def __call__(self, /, completions: Sequence[Any], **kwargs: Any) -> Any:
        try:
            return self._checked(await self._reward_func(completions=completions, **kwargs), len(completions))
        except Exception as error:
            return self._failed(error, len(completions))


def guarded(reward_func: Callable[..., Any]) -> Guarded:
    """Wrap a reward function, async or not: where it fails on a batch, no completion of that batch has a reward of it.

    A batch fails that raises, has another number of rewards than completions, or one that is no number. It is not
    tried again one by one: that would call a judge twice, log metrics twice, and give other values where a reward
    compares completions. A function that knows which completion went wrong returns `None` for it. So NaN and infinities
    are taken, each for its own completion. All of these are counted in `.missing`.

    >>> def inverse(completions, **kwargs):
    ...     return [1 / len(completion) if completion else None for completion in completions]
    >>> reward = guarded(inverse)
    >>> reward(completions=["ab", ""]), reward.missing, reward.__name__
    ([0.5, None], 0, 'inverse')
    """
    plain: Any = reward_func
    while isinstance(plain, functools.partial):
        plain = plain.func
    is_async = inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(plain.__call__)
    return (GuardedAsync if is_async else Guarded)(reward_func)


def _number(reward: Any) -> float | None:
    if reward is None:
        return None
    if not isinstance(reward, str | bytes):
        try:
            return float(reward)
        except OverflowError:
            return math.inf
        except (TypeError, ValueError):
            pass
    raise TypeError(f"the reward {reward!r:.60} is a {type(reward).__name__}, not a number")
