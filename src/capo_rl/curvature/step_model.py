"""Which model of the step fits the optimizer that trains: Adam's, SGD's or neither (Section 4.1)."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

# The classes of torch, apex, DeepSpeed, bitsandbytes, torchao and torchdistx that take Adam's step, and the values of
# `optim` that make one. In 8 or 4 bits, paged or fused it is the same step, and the model keeps its moments unrounded.
_ADAM_CLASS = re.compile(r"_?(Paged|Npu|Fused|DeepSpeedCPU|AnyPrecision)*AdamW?(4bit|8bit|32bit|Fp8)?")
_ADAM_NAME = re.compile(r"(paged_)?adamw(_\w+)?")

# The modes whose steps depend on what the step model says.
DECIDING = ("mask", "shorten")


@dataclass(frozen=True)
class Fit:
    """An optimizer by name, the step model that fits it (None: neither does), and what of it that leaves out."""

    name: str
    model: str | None
    without: str | None = None


def fit_of_optimizer(optimizer: Any) -> Fit:
    """The step model of an optimizer, or of one inside wrappers.

    >>> import torch
    >>> weight = [torch.nn.Parameter(torch.zeros(1))]
    >>> [fit_of_optimizer(make(weight)).model for make in (torch.optim.AdamW, torch.optim.SGD, torch.optim.NAdam)]
    ['adam', 'sgd', None]
    >>> fit_of_optimizer(torch.optim.SGD(weight, momentum=0.9))
    Fit(name='SGD with momentum', model=None, without=None)
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    momentum = any(group.get("momentum") for group in optimizer.param_groups)
    return _fit(type(optimizer), momentum, any(group.get("amsgrad") for group in optimizer.param_groups))


def fit_of_class(optimizer: type, arguments: Mapping[str, Any]) -> Fit:
    """The step model of an optimizer still to be made: its class and its arguments."""
    return _fit(optimizer, bool(arguments.get("momentum")), bool(arguments.get("amsgrad")))


def fit_of_name(optim: Any, optim_args: str | None = None) -> Fit:
    """The step model of the optimizer that `optim` names, as `transformers` makes it.

    >>> [fit_of_name(name).model for name in ("adamw_torch_fused", "paged_adamw_8bit", "sgd", "adafactor")]
    ['adam', 'adam', 'sgd', None]
    >>> fit_of_name("sgd", "momentum=0.9").name
    "optim='sgd' with momentum"
    """
    optim = getattr(optim, "value", optim)
    name = f"optim={optim!r}"
    if optim == "sgd":
        given = dict(each.split("=", 1) for each in (optim_args or "").replace(" ", "").split(",") if "=" in each)
        momentum = float(given.get("momentum", 0)) != 0
        return Fit(f"{name} with momentum", None) if momentum else Fit(name, "sgd")
    return Fit(name, "adam" if _ADAM_NAME.fullmatch(optim) else None)


def choose(capo_step: str, mode: str, fit: Fit) -> str:
    """The step model to use: what `capo_step` says, or with `auto` the one that fits.

    Raises `ValueError` where none fits and the mode's steps depend on it. Where they do not, and where an explicit
    choice is not the one that fits, says so once.
    """
    chosen = capo_step if capo_step != "auto" else fit.model
    if chosen is None and mode in DECIDING:
        raise ValueError(
            f"capo_step='auto' knows the steps of Adam and of SGD without momentum, and {fit.name} is neither, so "
            f"capo_mode={mode!r} would decide by a step that is not taken: use optim='adamw_torch', or "
            "capo_mode='trust_region', which measures steps; or set capo_step to the nearer of 'adam' and 'sgd'"
        )
    if chosen == "sgd" and mode == "shorten":
        raise ValueError(
            "capo_mode='shorten' multiplies the step by a share that is Adam's, and with SGD's step there is none: use "
            "an Adam (capo_step='adam'), or capo_mode='mask', whose SGD step is shorter by what is left out"
        )
    if chosen is None:
        logger.warning(
            "%s: neither Adam's step nor SGD's, so m_H, m_F and the predicted KL are those of an Adam, and say little "
            "here; capo_mode=%r decides nothing by them",
            fit.name,
            mode,
        )
    elif chosen != fit.model:
        logger.warning(
            "capo_step=%r models a step that %s does not take: m_H, m_F and the predicted KL are not this run's; "
            "capo_step='auto' chooses what fits",
            chosen,
            fit.name,
        )
    elif fit.without is not None:
        logger.warning("%s: %s", fit.name, fit.without)
    return chosen or "adam"


def group_of(optimizer: Any, weight: Tensor) -> int:
    """Which of the optimizer's groups has a weight; the first where none does, as for a frozen one."""
    groups = optimizer.param_groups
    return next((i for i, group in enumerate(groups) if any(each is weight for each in group["params"])), 0)


def _fit(optimizer: type, momentum: bool, amsgrad: bool) -> Fit:
    names = {each.__name__ for each in optimizer.__mro__}
    if any(_ADAM_CLASS.fullmatch(name) for name in names):
        without = "the step model does not keep amsgrad's maximum, so its steps are longer than the optimizer's"
        return Fit(optimizer.__name__, "adam", without if amsgrad else None)
    if "SGD" in names:
        return Fit("SGD with momentum", None) if momentum else Fit("SGD", "sgd")
    return Fit(optimizer.__name__, None)
