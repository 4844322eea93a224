"""Control of the whole step: no update moves the policy by more than a budget of KL, in nats a token.

The last-layer model sees one layer; a budget is about all of them. Four ways to keep it, the surest first:

    copy           measure the step that was taken, go back along it from a copy of the weights made before it
    optimizer      the same without the copy: Adam's state still holds the step
    learning_rate  measure, and set the next step's learning rate by it; no step is taken back
    prediction     set this step's learning rate by the last layer's predicted KL times how far the measured one was
                   above it when last measured; no forward pass but for the calibration

KL is quadratic in the length of a small step, so a step whose KL is D times the budget is shortened by √D. Going back
along the optimizer's own step is TRPO's backtracking line search (Schulman et al., 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from capo_rl.kl_regression import Ratio

Measure = Callable[[], float]

# Aim a little under the budget: at the budget itself rounding would ask for try after try.
_AIM = 0.9
_GROWTH = 2.0  # how much longer a step may be than the one before it, when the learning rate comes back


@dataclass(frozen=True)
class Shortened:
    """What became of an update: the KL it had, the KL it has now (nats a token), the fraction of it that is left."""

    proposed: float
    measured: float
    fraction: float


def shorten(take: Callable[[float], None], measure: Measure, budget: float, tries: int = 8) -> Shortened:
    """Take back part of a step until `measure()` is at most `budget`.

    `take(f)` puts the weights at the fraction f of the step, which is whole at the call. An update that is still over
    the budget after `tries` measurements, or whose KL is not finite (the weights left the numbers), is undone.

    >>> w = torch.tensor([2.0])
    >>> left = shorten(lambda f: w.fill_(2.0 * f), measure=lambda: float(w**2), budget=1.0)
    >>> round(left.measured, 4), round(left.fraction, 4)
    (0.9, 0.4743)
    """
    proposed = kl = measure()
    fraction = 1.0
    while not kl <= budget:  # so written, a NaN is over the budget
        tries -= 1
        if tries < 0 or not math.isfinite(kl):
            take(0.0)
            return Shortened(proposed, 0.0, 0.0)
        fraction *= math.sqrt(_AIM * budget / kl)
        take(fraction)
        kl = measure()
    return Shortened(proposed, kl, fraction)


class Way(Protocol):
    """The line from the weights before a step to those after it."""

    def take(self, fraction: float) -> None:
        """Put the weights at a fraction of the step."""


class CopiedStep:
    """The way back from a copy of the trained weights, made before the step: one more set of them in memory."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._weights = list(_trained(optimizer))
        self._before = [weight.detach().clone() for weight in self._weights]
        self._fraction = 1.0

    @torch.no_grad()
    def take(self, fraction: float) -> None:
        for weight, before in zip(self._weights, self._before, strict=True):
            # an infinite step times zero would be NaN
            weight.copy_(before.lerp(weight, fraction / self._fraction) if fraction else before)
        self._fraction = fraction or 1.0


def check_recomputable(optimizer: Optimizer) -> None:
    """Raises `TypeError` for an optimizer that is not torch's Adam or AdamW, and `ValueError` for amsgrad."""
    if not isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        raise TypeError(
            f"capo_kl_control='optimizer' recomputes Adam's step, and the optimizer is {type(optimizer).__name__}: "
            "use 'copy'"
        )
    if any(group["amsgrad"] for group in optimizer.param_groups):
        raise ValueError("capo_kl_control='optimizer' does not know amsgrad's step: use 'copy'")


class RecomputedStep:
    """The way back from the moments that made the step: no memory but that of one tensor at a time.

    Adam's step is −α p̂ / (√q̂ + ε), and its decoupled decay −α λ w, all of which are still at hand after it. Rounding
    is that of the weights' own type, so bfloat16 weights come back only to within their last digit: copy those.

    Raises as `check_recomputable`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        check_recomputable(optimizer)
        self._optimizer = optimizer
        self._lrs = [float(group["lr"]) for group in optimizer.param_groups]  # the scheduler moves them on
        self._steps = {weight: self._count(weight) for weight in _trained(optimizer)}
        self._fraction = 1.0

    @torch.no_grad()
    def take(self, fraction: float) -> None:
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            decay = lr * group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
            for weight in group["params"]:
                steps = self._count(weight)
                if steps == self._steps.get(weight):
                    continue  # it had no gradient, and was left alone
                state = self._optimizer.state[weight]
                beta1, beta2 = group["betas"]
                root = (state["exp_avg_sq"] / (1 - beta2**steps)).sqrt_().add_(group["eps"])
                # w = w₀ − f (αU + αλ w₀), from which w₀
                step = state["exp_avg"].div(root).mul_(lr / (1 - beta1**steps)).to(weight.dtype)
                before = weight.add(step, alpha=self._fraction).div_(1 - self._fraction * decay)
                weight.copy_(before.mul(1 - fraction * decay).sub_(step, alpha=fraction))
        self._fraction = fraction

    def _count(self, weight: Tensor) -> float:
        return float(self._optimizer.state.get(weight, {}).get("step", 0.0))


class Backtracking:
    """Measure every step, and go back along one that is over the budget."""

    scale = 1.0  # of the learning rate

    def __init__(self, budget: float, way: Callable[[Optimizer], Way]) -> None:
        self.budget = budget
        self._way = way
        self._step: Way | None = None

    def before_step(self, optimizer: Optimizer, predicted: float) -> None:
        self._step = self._way(optimizer)

    def after_optimizer(self, optimizer: Optimizer) -> None:
        pass

    def after_step(self, measure: Measure, due: bool) -> dict[str, float]:
        assert self._step is not None
        update = shorten(self._step.take, measure, self.budget)
        self._step = None
        return {
            "capo/kl/measured": update.measured,
            "capo/kl/proposed": update.proposed,
            "capo/kl/fraction": update.fraction,
        }

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        pass


class LearningRate:
    """Scale the learning rate of the coming step; `predict` chooses between the two rules of the module's head."""

    def __init__(self, budget: float, predict: bool) -> None:
        self.budget, self.predict = budget, predict
        self.scale = 1.0
        self.ratio = Ratio()
        self._predicted = 0.0
        self._lrs: list[float] = []

    def before_step(self, optimizer: Optimizer, predicted: float) -> None:
        """`predicted`: of the coming step in nats a token, planned with the `scale` of the last one."""
        whole = predicted / self.scale**2  # at the schedule's own learning rate
        if self.predict:
            kl = whole * self.ratio.value
            self.scale = min(1.0, math.sqrt(_AIM * self.budget / kl)) if kl > 0 else 1.0
        self._predicted = whole * self.scale**2
        self._lrs = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.scale

    def after_optimizer(self, optimizer: Optimizer) -> None:
        """Give the learning rate back before the scheduler looks at it."""
        for group, lr in zip(optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr

    def after_step(self, measure: Measure, due: bool) -> dict[str, float]:
        figures = {"capo/kl/fraction": self.scale}
        if self.predict and not due:
            return figures
        kl = measure()
        figures["capo/kl/measured"] = kl
        if self.predict:
            self.ratio.update(kl, self._predicted)
            figures["capo/kl/ratio"] = self.ratio.value
        elif kl > 0:  # a step without a gradient says nothing
            change = math.sqrt(_AIM * self.budget / kl) if math.isfinite(kl) else 0.1
            self.scale = min(1.0, self.scale * min(_GROWTH, change))
        return figures

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, **self.ratio.state_dict()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale = state.get("scale", 1.0)
        self.ratio.load_state_dict(state)


CONTROLS: dict[str, Callable[[float], Backtracking | LearningRate]] = {
    "copy": lambda budget: Backtracking(budget, CopiedStep),
    "optimizer": lambda budget: Backtracking(budget, RecomputedStep),
    "learning_rate": lambda budget: LearningRate(budget, predict=False),
    "prediction": lambda budget: LearningRate(budget, predict=True),
}


@torch.no_grad()
def shorten_momentum(optimizer: Optimizer, fraction: float) -> None:
    """Multiply Adam's first moments by the fraction of the step that was taken, so that the rest doesn't come back."""
    for weight in _trained(optimizer):
        if "exp_avg" in optimizer.state.get(weight, {}):
            optimizer.state[weight]["exp_avg"] *= fraction


def _trained(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
