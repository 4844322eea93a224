"""The step model is the optimizer's: chosen from it, refused or told where none fits, with its own constants."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers.training_args import OptimizerNames

from capo_rl import CAPOTrainer
from capo_rl.curvature.step import AdamStep, SGDStep
from capo_rl.curvature.step_model import fit_of_class, fit_of_name, fit_of_optimizer
from conftest import make_model

SOME = {"capo_fisher_threshold": 0.01, "capo_hessian_low": -0.2, "capo_hessian_high": 0.2, "max_steps": 2}
ADAMS = {
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision"),
    *("adamw_torch_4bit", "adamw_torch_8bit", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
}


def told(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("capo_rl"))


@pytest.mark.parametrize("name", sorted(each.value for each in OptimizerNames))
def test_every_optimizer_of_transformers_has_its_model_or_none(name):
    assert fit_of_name(name).model == ("adam" if name in ADAMS else "sgd" if name == "sgd" else None)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *((each, "adam") for each in ("AdamW8bit", "PagedAdamW32bit", "FusedAdam", "DeepSpeedCPUAdam", "_AdamW")),
        *((each, None) for each in ("Lion", "Muon", "NAdam", "AdEMAMix8bit", "Adafactor", "Adamax", "SGD8bit")),
    ],
)
def test_classes_of_other_libraries_are_known_by_name(name, model):
    made = type(name, (torch.optim.Optimizer,), {})
    assert fit_of_class(made, {}).model == model
    assert fit_of_class(type("Mine", (made,), {}), {}).model == model


def test_momentum_and_amsgrad_are_seen():
    weight = [torch.nn.Parameter(torch.zeros(1))]
    assert fit_of_optimizer(torch.optim.SGD(weight, momentum=0.9)).model is None
    assert fit_of_class(torch.optim.SGD, {"momentum": 0.9}).model is None
    assert fit_of_name("sgd", "nesterov=true, momentum=0.9").model is None
    assert fit_of_name("sgd", "weight_decay=0.1").model == "sgd"
    assert fit_of_class(torch.optim.AdamW, {"amsgrad": True}).without is not None


@pytest.mark.parametrize(
    ("optim", "step"), [("adamw_torch_fused", AdamStep), ("adamw_torch", AdamStep), ("sgd", SGDStep)]
)
@pytest.mark.parametrize("mode", ["mask", "monitor", "trust_region"])
def test_the_optimizers_own_is_the_default(build, caplog, optim, step, mode):
    with caplog.at_level(logging.WARNING):
        trainer = build(optim=optim, capo_mode=mode, capo_watch=True)
    assert isinstance(trainer.planner.step, step)
    assert not told(caplog)


def test_the_default_predicts_sgds_step(build):
    """What went wrong: Adam's step was predicted for SGD, and nearly every token rejected for it."""
    model = make_model()
    trainer = build(model=model, optim="sgd", learning_rate=1e-2, capo_mode="monitor", capo_top_k=None, max_steps=2)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name == "lm_head.weight")
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "capo/kl/measured" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert entry["capo/kl/predicted"] == pytest.approx(entry["capo/kl/measured"], rel=0.05)


@pytest.mark.parametrize("settings", [{"optim": "adafactor"}, {"optim": "sgd", "optim_args": "momentum=0.9"}], ids=str)
def test_where_none_fits_modes_that_decide_by_it_are_refused(build, caplog, settings):
    for mode in ("mask", "shorten"):
        with pytest.raises(ValueError, match=r"capo_step='auto' knows.*optim=.*is neither.*use optim='adamw_torch'"):
            build(capo_mode=mode, **settings)
    for mode in ("monitor", "trust_region"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            build(capo_mode=mode, capo_watch=True, **settings, max_steps=1).train()
        assert told(caplog).count("neither Adam's step nor SGD's") == 1
    build(capo_mode="off", **settings)


@pytest.mark.parametrize("handed", ["optimizers", "optimizer_cls_and_kwargs"])
def test_an_optimizer_that_is_handed_in_is_looked_at(build, handed):
    model = make_model()
    if handed == "optimizers":
        trainer = build(model=model, optimizers=(torch.optim.SGD(model.parameters(), lr=1e-3), None), **SOME)
        assert isinstance(trainer.planner.step, SGDStep)
        with pytest.raises(ValueError, match="SGD with momentum is neither"):
            build(model=model, optimizers=(torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.5), None), **SOME)
    else:

        class With(CAPOTrainer):
            optimizer_cls_and_kwargs = property(lambda self: (torch.optim.NAdam, {}), lambda self, value: None)

        with pytest.raises(ValueError, match="NAdam is neither"):
            build(With, **SOME)


def test_an_optimizer_that_a_subclass_makes_is_looked_at_when_it_is_made(build):
    class Mine(CAPOTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)
            return self.optimizer

    with pytest.raises(ValueError, match=r"the optimizer is SGD and optim='adamw_torch_fused'.*set capo_step='sgd'"):
        build(Mine, **SOME).train()
    build(Mine, capo_step="sgd", **SOME).train()


def test_a_choice_that_does_not_fit_is_told(build, caplog):
    with caplog.at_level(logging.WARNING):
        build(optim="sgd", capo_step="adam", **SOME).train()
    assert told(caplog).count("capo_step='adam' models a step that optim='sgd' does not take") == 1


def test_amsgrad_is_told(build, caplog):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
    with caplog.at_level(logging.WARNING):
        build(model=model, optimizers=(optimizer, None), **SOME).train()
    assert told(caplog).count("does not keep amsgrad's maximum") == 1


def test_shorten_has_nothing_to_shorten_under_sgd(build):
    with pytest.raises(ValueError, match="capo_mode='shorten' multiplies the step by a share that is Adam's"):
        build(capo_mode="shorten", optim="sgd")


def test_constants_and_learning_rate_are_those_of_the_heads_own_group(build):
    """Betas, eps and the rate of another optimizer than `args` describe: the planned step is still the one taken."""
    model = make_model()
    head = model.lm_head.weight
    rest = [weight for weight in model.parameters() if weight is not head]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "lr": 0.0}, {"params": [head], "lr": 1e-3, "betas": (0.5, 0.7), "eps": 1e-5}], weight_decay=0
    )
    optimizer.param_groups[0]["lr"] = 1e-12  # a rate of zero would leave no ratio to it
    settings = {"capo_mode": "monitor", "capo_top_k": None, "max_steps": 3, "max_grad_norm": 0.0}
    trainer = build(model=model, optimizers=(optimizer, None), **settings)
    trainer.train()
    step = trainer.planner.step
    assert (step.betas, step.eps, trainer.planner.share.beta2) == ((0.5, 0.7), 1e-5, 0.7)
    state = optimizer.state[head]
    rows = step.rows
    torch.testing.assert_close(step.moments(rows)[1], state["exp_avg_sq"][rows], rtol=1e-3, atol=1e-9)
    for entry in [entry for entry in trainer.state.log_history if "capo/kl/measured" in entry]:
        assert entry["capo/kl/predicted"] == pytest.approx(entry["capo/kl/measured"], rel=0.05)
