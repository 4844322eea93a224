"""A trust region for the whole step: no update moves the policy by more than a budget of KL, in nats a token.

The last-layer model sees one layer; a budget is about all of them, so KL is measured after each update, on the step's
own tokens. KL is quadratic in the length of a small step: a step whose KL is D times the budget is shortened by √D.
Three ways to keep a budget B:

    learning_rate  steer: the coming step's learning rate is at most √(B/10 / κ̄), where κ̄ is the moving mean of the KL
                   that a step of learning rate 1 would have had; go back along an update that is over B all the same
    copy           take every step at the schedule's rate, go back along it from a copy of the weights made before it
    optimizer      the same without the copy: Adam's state still holds the step

Going back along the optimizer's own step is TRPO's backtracking line search (Schulman et al., 2015); steering by the
last KL is PPO's adaptive coefficient (Schulman et al., 2017) with the learning rate in the penalty's place.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from capo_rl.curvature.step_model import group_of
from capo_rl.planning.defaults import KL_BUDGET, KL_START

logger = logging.getLogger(__name__)

Measure = Callable[[], float]

# Aim a little under the budget: at the budget itself rounding would ask for try after try.
_AIM = 0.9
# Of the steered learning rate: what is left of the mean's old values at each step; the mean KL it aims at, as a share
# of the budget; how much longer a step may be than the one before it; what is left after one whose KL was no number.
MEMORY = 0.8
_MEAN, _GROWTH, _SHRINK = 0.1, 2.0, 0.1
_FLOOR = 1e-20  # of the learning rate, from which it can double its way back
# The share of a budget above which the KL of no step at all makes the budget meaningless.
_NOISE = 0.05
# Steps undone one after another at which the run says so.
_UNDONE = 10


@dataclass(frozen=True)
class Shortened:
    """What became of an update: the KL it had, the KL it has now (nats a token), the fraction of it that is left."""

    proposed: float
    measured: float
    fraction: float

    def figures(self) -> dict[str, float]:
        """These three, as they are logged."""
        return {f"capo/kl/{name}": value for name, value in vars(self).items()}


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
    """Raises `ValueError` for an optimizer that is not torch's Adam or AdamW, and for one with amsgrad."""
    if (why := _not_recomputed(optimizer)) is not None:
        raise ValueError(f"capo_kl_control='optimizer' {why}: use 'copy'")


def _not_recomputed(optimizer: Optimizer) -> str | None:
    """Why an optimizer's step can't be had from its state, None if it can."""
    if not isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        return f"recomputes Adam's step, and the optimizer is {type(optimizer).__name__}"
    if any(group["amsgrad"] for group in optimizer.param_groups):
        return "does not know amsgrad's step"
    return None


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
        self._stepped = {weight for weight in _trained(optimizer) if weight.grad is not None}
        self._fraction = 1.0

    @torch.no_grad()
    def take(self, fraction: float) -> None:
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            decay = lr * group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
            for weight in group["params"]:
                if weight not in self._stepped:
                    continue  # it had no gradient, and was left alone
                state = self._optimizer.state[weight]
                steps = float(state["step"])
                beta1, beta2 = group["betas"]
                root = (state["exp_avg_sq"] / (1 - beta2**steps)).sqrt_().add_(group["eps"])
                # w = w₀ − f (αU + αλ w₀), from which w₀
                step = state["exp_avg"].div(root).mul_(lr / (1 - beta1**steps)).to(weight.dtype)
                before = weight.add(step, alpha=self._fraction).div_(1 - self._fraction * decay)
                weight.copy_(before.mul(1 - fraction * decay).sub_(step, alpha=fraction))
        self._fraction = fraction


def way_back(optimizer: Optimizer) -> Way:
    """The cheaper way back from the coming step: from Adam's moments where they make its step to the last digit."""
    exact = all(weight.dtype in (torch.float32, torch.float64) for weight in _trained(optimizer))
    return RecomputedStep(optimizer) if exact and _not_recomputed(optimizer) is None else CopiedStep(optimizer)


class Backtracking:
    """Every step at the schedule's rate; one that is over the budget is taken back in part."""

    def __init__(self, budget: float, way: Callable[[Optimizer], Way]) -> None:
        self.budget = budget
        self._way = way
        self._step: Way | None = None

    def scale(self, lr: float) -> float:
        """What to multiply the learning rate of the coming step by."""
        return 1.0

    def before_step(self, optimizer: Optimizer) -> None:
        """The step is about to be taken: keep the way back."""
        self._step = self._way(optimizer)

    def after_step(self, lr: float, measure: Measure, informative: bool = True) -> Shortened:
        """The step was taken at the learning rate `lr`: measure it, and take back what is over the budget."""
        assert self._step is not None
        update, self._step = shorten(self._step.take, measure, self.budget), None
        return update

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        pass


class Steering:
    """The learning rate that keeps the mean KL of updates at a tenth of the budget, and the way back from one above it.

        κ̄ = Σ_t m^{n−t} KL_t / lr_t²  /  Σ_t m^{n−t}        limit_{n+1} = min(2 limit_n, √(B/10 / κ̄))

    The mean is arithmetic, so one large update shortens those after it at once, and a small one lengthens them slowly:
    at one learning rate the KL of a step varies by a factor of ten and more from batch to batch. Nothing is known at
    first: the limit is `first`, and at most doubles each step. `way=None`, for engines that own the weights: no update
    is taken back.

    >>> control = Steering(budget=1e-2, first=1e-6, way=None)
    >>> control.scale(1e-3)                                # at first a thousandth of the schedule's rate
    0.001
    >>> _ = control.after_step(1e-6, lambda: 1e-9)          # κ̄ = 1e3: √(1e-3 / 1e3) = 1e-3, but at most twice 1e-6
    >>> control.scale(1e-3)
    0.002
    """

    def __init__(self, budget: float, first: float, way: Callable[[Optimizer], Way] | None) -> None:
        self.budget, self.limit = budget, first
        self.way = way
        self._step: Way | None = None
        self._kl = self._weight = 0.0

    def scale(self, lr: float) -> float:
        """What to multiply the learning rate of the coming step by, given the schedule's."""
        return min(1.0, self.limit / lr) if lr > 0 else 1.0

    def before_step(self, optimizer: Optimizer) -> None:
        """The step is about to be taken: keep the way back."""
        self._step = None if self.way is None else self.way(optimizer)

    def after_step(self, lr: float, measure: Measure, informative: bool = True) -> Shortened:
        """The step was taken at the learning rate `lr`: measure it, go back if it is over the budget, learn from it.

        One that was not `informative` had no gradient of its own, only momentum: it says nothing about one that has.
        """
        if self._step is None:
            kl = measure()
            update = Shortened(kl, kl, 1.0)
        else:
            update, self._step = shorten(self._step.take, measure, self.budget), None
        if not math.isfinite(update.proposed):
            self.limit = max(_SHRINK * min(lr, self.limit), _FLOOR)
        # a step of length zero says nothing either, whatever rounding makes of its KL
        elif informative and update.proposed > 0 and lr > 0:
            self._kl = MEMORY * self._kl + update.proposed / lr**2
            self._weight = MEMORY * self._weight + 1
            allowed = math.sqrt(_MEAN * self.budget * self._weight / self._kl)
            self.limit = max(min(_GROWTH * self.limit, allowed), _FLOOR)
        return update

    def state_dict(self) -> dict[str, float]:
        return {"limit": self.limit, "kl": self._kl, "weight": self._weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.limit, self._kl, self._weight = state["limit"], state["kl"], state["weight"]


class TrustRegion:
    """How long each step of an optimizer is: held to a budget of KL, and multiplied by a share.

    Any `torch.optim.Optimizer` will do, and any schedule of its learning rates. Around each of its steps:

        region = TrustRegion(optimizer, budget=5e-3)        # nats a token, for each update
        ...
        loss.backward()
        region.before_step()                                # the optimizer's learning rates are the step's
        optimizer.step()
        region.after_step(measure)                          # and again the schedule's
        scheduler.step()

    `measure()` is the mean KL(π ‖ π') in nats a token from the policy before the step to that of the weights as they
    are when it is called (`Planner.measured_kl`). It is called once, and again for each try where the update was over
    the budget and part of it is taken back. A step that is left out (`optimizer.step()` is not called) needs neither
    call.

    A number as `budget` is kept by `Steering`, which starts slowly; a `Steering` or `Backtracking` of one's own keeps
    it another way; with None there is no budget, and only the share shortens steps.

    Raises `TypeError` for what is no optimizer, and `ValueError` for a budget that is not above 0 or an optimizer whose
    step no learning rate scales.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> region = TrustRegion(optimizer, Backtracking(0.09, CopiedStep))
    >>> weight.grad = torch.ones(1)
    >>> _ = region.before_step(share=0.5)
    >>> optimizer.step()                                    # from 1 to ½
    >>> update = region.after_step(lambda: (1 - weight.item()) ** 2)
    >>> update.proposed, round(update.measured, 3), round(weight.item(), 3), optimizer.param_groups[0]["lr"]
    (0.25, 0.081, 0.715, 1.0)
    """

    def __init__(self, optimizer: Optimizer, budget: float | Steering | Backtracking | None = KL_BUDGET) -> None:
        check_steerable(optimizer)
        self.optimizer = optimizer
        if isinstance(budget, int | float):
            if not budget > 0:
                raise ValueError(f"budget={budget} must be above 0 nats a token, or None for no budget")
            # a schedule that warms up has set `lr` to its first value already
            first = KL_START * max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
            if not first > 0:
                raise ValueError(
                    "every lr of the optimizer is 0, and the slow start is a share of it: give it the learning rate "
                    "before the TrustRegion is made, or budget=Steering(budget, first=..., way=way_back)"
                )
            budget = Steering(budget, first, way_back)
        self.control = budget
        self._rates: list[Any] | None = None  # the schedule's, while the optimizer has the step's
        self._scale = 1.0  # of those to these
        self._lr: float | None = None  # the largest of the step that is not measured yet
        self._undone = 0  # steps in a row

    @property
    def scale(self) -> float:
        """What of the schedule's learning rates the coming step may have; between `before_step` and `after_step`, what
        it has, the share included."""
        if self._rates is not None:
            return self._scale
        return 1.0 if self.control is None else self.control.scale(self._largest())

    def lr(self, weight: Tensor | None = None) -> float:
        """The learning rate that the coming step may have (has, after `before_step`) for a weight, or for the first
        group: what the step model is to reckon with."""
        at = 0 if weight is None else group_of(self.optimizer, weight)
        lr = float(self.optimizer.param_groups[at]["lr"])
        return lr if self._rates is not None else self.scale * lr

    def check_noise(self, measure: Measure) -> float:
        """The KL of no step at all, for once before a step: what rounding makes of two forward passes that should be
        the same. Says so where it is too much for the budget."""
        noise = measure()
        if self.control is not None and not noise < _NOISE * self.control.budget:
            logger.warning(
                "rounding alone looks like a KL of %.1e nats a token here, and the budget of %g (capo_kl_budget) holds "
                "updates to a tenth of it on average: it can't be kept. Use a larger one, measure on all completions "
                "(capo_kl_sample=1.0; the same shapes round alike), or weights in float32",
                noise,
                self.control.budget,
            )
        return noise

    def before_step(self, share: float = 1.0) -> float:
        """The optimizer is about to step: give it the step's learning rates, `share` times what the budget allows, and
        keep the way back. Returns `scale`.

        Raises `RuntimeError` where the step before was not finished.
        """
        if self._rates is not None:
            raise RuntimeError(
                "before_step was called twice and the learning rates are still those of the first: call "
                "after_step(measure) after each optimizer.step(), or restore() where nothing is measured"
            )
        self._scale = self.scale * share
        self._lr = self._scale * self._largest()
        groups = self.optimizer.param_groups
        self._rates = [lr.clone() if isinstance(lr := group["lr"], Tensor) else lr for group in groups]
        if self._scale != 1.0:
            for group, lr in zip(groups, self._rates, strict=True):
                _set_lr(group, lr * self._scale)
        if self.control is not None:
            self.control.before_step(self.optimizer)
        return self._scale

    def restore(self) -> None:
        """Give the optimizer the schedule's learning rates back, before the schedule looks at them; `after_step` does
        so too."""
        if self._rates is not None:
            for group, lr in zip(self.optimizer.param_groups, self._rates, strict=True):
                _set_lr(group, lr)
            self._rates = None

    def after_step(self, measure: Measure, informative: bool = True) -> Shortened | None:
        """The optimizer has stepped: measure the update, take back what is over the budget, and learn from it.

        One that was not `informative` (`Planner.has_gradient`) had no gradient of its own, only momentum. None without
        a budget, and then `measure` is not called. Raises `RuntimeError` without `before_step`.
        """
        if self._lr is None:
            raise RuntimeError(
                "after_step came without before_step, so there is no way back from this step: call before_step() "
                "right before optimizer.step()"
            )
        self.restore()
        lr, self._lr = self._lr, None
        if self.control is None:
            return None
        update = self.control.after_step(lr, measure, informative)
        self._undone = self._undone + 1 if update.fraction == 0 else 0
        if self._undone == _UNDONE:
            logger.warning(
                "%d steps in a row were over the budget of %g nats a token however short, or had a KL that is no "
                "number, and were undone: the model does not train. Look at the KL they had before (capo/kl/proposed); "
                "a smaller learning rate may help",
                _UNDONE,
                self.control.budget,
            )
        return update

    def state_dict(self) -> dict[str, float]:
        """What the budget's control has learned, as plain numbers."""
        return {} if self.control is None else self.control.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from what `state_dict` gave."""
        if self.control is not None:
            self.control.load_state_dict(state)

    def _largest(self) -> float:
        return max(float(group["lr"]) for group in self.optimizer.param_groups)


def check_steerable(optimizer: Any) -> None:
    """Raises `TypeError` for what is no optimizer, and `ValueError` for a group without a learning rate to scale."""
    groups = getattr(optimizer, "param_groups", None)
    if not groups:
        raise TypeError(f"a {type(optimizer).__name__} has no param_groups: give the torch.optim.Optimizer that trains")
    for i, group in enumerate(groups):
        if group.get("lr") is None:
            raise ValueError(
                f"group {i} of the {type(optimizer).__name__} has no lr, by which the length of a step is steered: use "
                "an optimizer that takes a learning rate and does not choose it by itself"
            )


def _set_lr(group: dict[str, Any], lr: Any) -> None:
    """A tensor is written into: a compiled or captured step reads that very tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(lr)
    else:
        group["lr"] = lr


def _trained(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
