"""Watching a stock `GRPOTrainer`, or a subclass of it, without a change to its script but one line."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import TrainerCallback
from trl import GRPOTrainer

from capo_rl.curvature.selection import Thresholds
from capo_rl.settings.config import CAPOConfig, check_capo
from capo_rl.trainers.trl import CAPOTrainer

_OURS: dict[str, Any] = {
    field.name: field.default for field in fields(CAPOConfig) if field.name.startswith("capo_")
} | {"capo_mode": "monitor"}
# The public names of ours that TRL's trainer has not; `base_model` is read for a model card, which stays the trainer's.
_ADDED = [
    name
    for name in vars(CAPOTrainer) | CAPOTrainer.__annotations__
    if not name.startswith("_") and name not in {"base_model", *dir(GRPOTrainer)}
]


class MonitorCallback(TrainerCallback):
    """Computes and logs what `CAPOTrainer` does with `capo_mode="monitor"`, and changes nothing of the run.

    Settings are the `capo_...` fields of `CAPOConfig`; those that would change the run are refused.

        trainer = GRPOTrainer(model, reward_funcs, args=GRPOConfig(...), train_dataset=dataset)
        trainer.add_callback(MonitorCallback(trainer))
        trainer.train()

    The two seams that `capo_rl.trainers.trl` describes are methods, so the object is given a class with both its own
    methods and `CAPOTrainer`'s. Raises `TypeError` for a trainer that is not TRL's, `ValueError` for settings that
    don't fit.
    """

    def __init__(self, trainer: GRPOTrainer, **settings: Any) -> None:
        if not isinstance(trainer, GRPOTrainer):
            raise TypeError(f"trainer is a {type(trainer).__name__}: MonitorCallback watches trl.GRPOTrainer")
        if isinstance(trainer, CAPOTrainer):
            raise TypeError('trainer is a CAPOTrainer, which watches itself: set capo_mode="monitor"')
        if unknown := settings.keys() - _OURS.keys():
            raise ValueError(f"{', '.join(sorted(unknown))}: not a setting of CAPO's, which are {', '.join(_OURS)}")
        for name in ("capo_mode", "capo_advantage"):
            if settings.get(name, _OURS[name]) != _OURS[name]:
                raise ValueError(f"{name}={settings[name]!r} would change the run, and MonitorCallback only watches it")
        args, ours = trainer.args, _OURS | settings
        for name, value in ours.items():
            setattr(args, name, value)
        check_capo(args)
        args.thresholds = Thresholds(
            ours["capo_fisher_threshold"], (ours["capo_hessian_low"], ours["capo_hessian_high"])
        )
        args.kl_budget, args.changes_the_run, args.predicts = None, False, True
        own = type(trainer)
        if taken := [name for name in _ADDED if hasattr(trainer, name)]:
            raise TypeError(
                f"{own.__name__} has its own {', '.join(taken)}, which is what MonitorCallback adds to a trainer: give "
                "it another name"
            )
        trainer.__class__ = type(
            own.__name__, (CAPOTrainer, own), {"_name": own._name, "create_model_card": own.create_model_card}
        )
        trainer.prepare_selection()
