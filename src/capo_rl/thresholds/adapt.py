"""Thresholds that move during training, so that the share of rejected tokens stays near a target."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from capo_rl.thresholds.rejection_rate import bounded, factors_at, rejected, scaled, severity


class AdaptThresholds(TrainerCallback, ExportableState):
    """Keeps the rejection rate r of a run near a target by moving δ_F and δ_H; not in the paper, and off unless added:

        trainer.add_callback(AdaptThresholds(trainer, rejection_rate=0.05))

    With f* the factors on the run's first bounds at which a share a of this step's tokens would be rejected
    (`rejection_rate.factors_at`),

        log f += clip(0.2 (log f* − log f), ±log 2)     within ±log 100
        log a −= 0.1 (rejected / r − 1)                 within log r ± log 2

    The first follows a running quantile. The second, with a = r at first, takes out what is left: shifts vary from step
    to step, and the mean rate at a quantile's mean logarithm is above r. A step without a shift, as at the start of a
    warm-up from zero, moves nothing. The bounds that judged a step are logged as `capo/thresholds/fisher` and
    `capo/thresholds/hessian` (the upper side, or the lower if that is open). Checkpoints keep f and a. Of several
    processes each looks at its own tokens, and all take the mean.

    Raises `ValueError` for a rate outside (0, 1), and for a run whose thresholds don't decide or are moved already.
    """

    def __init__(self, trainer: Any, rejection_rate: float) -> None:
        args = trainer.args
        if not 0 < rejection_rate < 1:
            raise ValueError(f"rejection_rate={rejection_rate} is a share of the tokens: give it in (0, 1)")
        for name, unsuitable, why in (
            ("capo_mode", args.capo_mode == "off", "looks at no token"),
            ("capo_watch", not args.predicts, "with capo_mode='trust_region' predicts no shift"),
            ("capo_granularity", args.capo_granularity != "token", "judges subsets, and the rate is one of tokens"),
            (
                "restore_callback_states_from_checkpoint",
                args.restore_callback_states_from_checkpoint,
                "builds callbacks anew without their trainer; this one reads its checkpoint by itself",
            ),
        ):
            if unsuitable:
                raise ValueError(f"AdaptThresholds: {name}={getattr(args, name)!r} {why}: leave one of the two out")
        self.trainer, self.rejection_rate, self.start = trainer, rejection_rate, args.thresholds
        self.log_factors = np.zeros(len(severity(np.zeros(1), np.zeros(1), self.start)))
        self.aim = rejection_rate

    def on_train_begin(self, args, state, control, **kwargs):
        if kept := state.stateful_callbacks.get(type(self).__name__):
            self.log_factors, self.aim = np.array(kept["attributes"]["log_factors"]), kept["attributes"]["aim"]
        self._apply()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._log()
        shifts = [batch.shifts[~batch.shifts.nonfinite] for batch in self.trainer.planner.micro_batches]
        m_f, m_h = (np.concatenate([getattr(x, of).double().cpu().numpy() for x in shifts]) for of in ("m_f", "m_h"))
        # What this process's tokens say: log f* for each criterion, and what was rejected. Processes without a shift
        # are silent; the sum is the same everywhere, so all take the same step.
        said = np.zeros(len(self.log_factors) + 2)
        if len(m_f):
            severities = severity(m_f, m_h, self.start)
            if (severities > 0).any():
                # a criterion in which too few tokens have a shift asks for a bound of 0: as far down as it may go
                wanted = np.log(factors_at(severities, self.aim).clip(min=1e-30))
                said = np.array([*wanted, rejected(severities, np.exp(self.log_factors)), 1.0])
        accelerator = self.trainer.accelerator
        *wanted, rate, speakers = accelerator.reduce(torch.tensor(said, device=accelerator.device)).tolist()
        if speakers:
            step = 0.2 * (np.array(wanted) / speakers - self.log_factors)
            moved = self.log_factors + np.clip(step, -math.log(2), math.log(2))
            self.log_factors = np.clip(moved, -math.log(100), math.log(100))
            aim = self.aim * math.exp(-0.1 * (rate / speakers / self.rejection_rate - 1))
            self.aim = min(max(aim, self.rejection_rate / 2), 2 * self.rejection_rate, 1.0)
            self._apply()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"log_factors": self.log_factors.tolist(), "aim": self.aim}}

    def _apply(self) -> None:
        self.trainer.planner.thresholds = scaled(self.start, np.exp(self.log_factors))

    def _log(self) -> None:
        used = self.trainer.planner.thresholds
        low, high = used.hessian
        for name, bound in (("fisher", used.fisher), ("hessian", high if bounded(high) else low)):
            if bounded(bound):
                self.trainer._metrics["train"][f"capo/thresholds/{name}"].append(bound)
