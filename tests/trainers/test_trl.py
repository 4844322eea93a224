"""The trainer: bit-for-bit TRL with selection off, and its objective, moments and counts with selection on."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from capo_rl import CAPOTrainer, Thresholds
from capo_rl.planning.updates import Moved
from capo_rl.trainers.step_choice import torch_optimizer
from conftest import make_model, wants_even_words

LOSSES = ["grpo", "dr_grpo", "dapo", "bnpo"]
OPEN = {"capo_fisher_threshold": None, "capo_hessian_low": None, "capo_hessian_high": None}
# Bounds that reject some of the tiny model's tokens and keep others.
SOME = {"capo_fisher_threshold": 0.01, "capo_hessian_low": -0.2, "capo_hessian_high": 0.2}


def trajectory(trainer) -> tuple[list[float], list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Train, and return every loss, every step's gradients and the final weights."""
    gradients: list[dict[str, torch.Tensor]] = []
    step = trainer._clip_grad_norm

    def clip(model):
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return step(model)

    trainer._clip_grad_norm = clip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, gradients, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_bitwise_equal(one, other):
    losses, gradients, weights = one
    assert losses == other[0]
    assert len(losses) == len(gradients) == 5
    for mine, theirs in zip([*gradients, weights], [*other[1], other[2]], strict=True):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("loss_type", LOSSES)
def test_off_monitor_and_open_thresholds_are_trl_bit_for_bit(build, loss_type):
    settings = {"loss_type": loss_type, "beta": 0.02}
    stock = trajectory(build(GRPOTrainer, GRPOConfig, **settings))
    assert any(tensor.any() for step in stock[1] for tensor in step.values())
    assert_bitwise_equal(trajectory(build(capo_mode="off", **settings)), stock)
    assert_bitwise_equal(trajectory(build(capo_mode="monitor", **SOME, **settings)), stock)
    assert_bitwise_equal(trajectory(build(capo_mode="mask", **OPEN, **settings)), stock)


def test_masking_changes_the_run(build):
    stock = trajectory(build(capo_mode="off"))
    masked = trajectory(build(capo_mode="mask", **SOME))
    assert stock[0] != masked[0]


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_moments_are_those_of_the_optimizer(build, loss_type, beta):
    """The head is trained by Adam on clipped gradients: the step model's moments must be the optimizer's own."""
    trainer = build(
        capo_mode="mask",
        loss_type=loss_type,
        beta=beta,
        capo_top_k=None,
        max_grad_norm=0.05,
        num_iterations=2,
        **SOME,
    )
    trainer.train()
    head = trainer.model.lm_head.weight
    state = trainer.optimizer.state[head]
    p, q = trainer.planner.step.moments(torch.arange(len(head)))
    assert trainer.planner.step.steps == int(state["step"]) == 5
    assert state["exp_avg"].abs().max() > 0
    torch.testing.assert_close(p, -state["exp_avg"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(q, state["exp_avg_sq"], rtol=1e-4, atol=1e-10)


class Watch(TrainerCallback):
    """Calls `look()` when the gradients are there and the optimizer has not stepped yet."""

    def __init__(self, look):
        self.look = look

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.look()


def logs(trainer) -> list[dict[str, float]]:
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_objective_has_the_denominators_of_accepted_tokens(build, loss_type):
    trainer = build(loss_type=loss_type, gradient_accumulation_steps=1, max_steps=1, **SOME)
    seen = {}
    select = trainer._select

    def spy(model, inputs, mask, hidden, logps):
        seen.update(mask=mask, advantages=inputs["advantages"].clone())
        select(model, inputs, mask, hidden, logps)

    trainer._select = spy
    trainer.add_callback(Watch(lambda: seen.update(planned=trainer.planner.micro_batches[0])))
    trainer.train()
    mask, planned = seen["mask"], seen["planned"]
    keep = torch.zeros_like(mask)
    keep[mask] = planned.keep
    assert 0 < keep.sum() < mask.sum()
    a = seen["advantages"][:, None] * keep
    expected = {
        "grpo": a / keep.sum(1, keepdim=True).clamp(min=1) / len(a),  # mean over sequences of their accepted means
        "bnpo": a / keep.sum(),
        "dapo": a / keep.sum(),
        "dr_grpo": a / (len(a) * 6),  # the maximum length, whatever is rejected
    }[loss_type]
    torch.testing.assert_close(planned.weights, expected[mask], rtol=1e-5, atol=1e-8)


def test_every_figure_is_logged(build):
    entries = logs(build(**SOME))
    names = {
        f"capo/{level}/{symbol}/{of}"
        for level in ("token", "token_accepted")
        for symbol in ("m_h", "m_f")
        for of in ("mean", "q50", "q90", "q99", "max")
    }
    names |= {f"capo/{level}/{symbol}" for level in ("batch", "batch_accepted") for symbol in ("m_h", "m_f")}
    names |= {f"capo/rejection_rate{sign}" for sign in ("", "/positive", "/negative")}
    names |= {f"capo/missing_mass/{of}" for of in ("mean", "max", "above_bound")}
    names |= {"capo/kl/predicted", "capo/kl/measured", "capo/kl/seconds", "capo/seconds", "capo/completions"}
    names |= {"capo/accepted_tokens", "capo/nonfinite_shifts", "capo/steps_skipped", "capo/rewards_missing"}
    for entry in entries:
        assert names <= entry.keys()
        assert 0 < entry["capo/rejection_rate"] < 1
        assert entry["capo/token_accepted/m_f/max"] <= SOME["capo_fisher_threshold"]
    assert entries[-1]["capo/completions"] == 5 * 8


def test_measured_kl_is_that_of_the_whole_model(build):
    """Against log-probabilities of the model before and after its first step, over the whole vocabulary."""
    trainer = build(capo_mode="monitor", capo_top_k=None, gradient_accumulation_steps=1, max_steps=1)
    seen = {}

    def full_log_policy():
        forward, mask = trainer.measuring.forwards[0].run, trainer.measuring.forwards[0].mask
        ids, length = forward.keywords["input_ids"], mask.shape[1]
        logits = trainer.model(input_ids=ids, attention_mask=forward.keywords["attention_mask"]).logits
        return (logits[:, :-1][:, -length:][mask] / trainer.args.temperature).log_softmax(-1).detach()

    trainer.add_callback(Watch(lambda: seen.update(before=full_log_policy())))
    measure = trainer.optimizer_steps.measure_kl

    def measure_kl():
        seen["after"] = full_log_policy()
        return measure()

    trainer.optimizer_steps.measure_kl = measure_kl
    (entry,) = logs(trainer)
    kl = (seen["before"].exp() * (seen["before"] - seen["after"])).sum(-1).mean()
    assert entry["capo/kl/measured"] == pytest.approx(float(kl), rel=1e-4)
    assert entry["capo/kl/measured"] > 0


@pytest.mark.parametrize("sample", [1.0, 0.5])
def test_measured_kl_is_the_same_through_the_scoring_of_trl(build, monkeypatch, sample):
    """As where the model is in shards, and only its wrapper can run it."""
    own = logs(build(capo_mode="monitor", capo_kl_sample=sample, max_steps=2))
    monkeypatch.setattr("capo_rl.trainers.measuring._WHOLE", ())
    scored = logs(build(capo_mode="monitor", capo_kl_sample=sample, max_steps=2))
    assert [entry["capo/kl/measured"] for entry in own] == [entry["capo/kl/measured"] for entry in scored]
    assert own[0]["capo/kl/measured"] > 0


def test_predicted_kl_is_exact_for_a_small_step_of_the_head_alone(build):
    """With only the head trained, ½ΔψᵀFΔψ of the coming step is the KL it will have, up to the cube of the step."""
    model = make_model()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    entries = logs(build(model=model, capo_mode="monitor", capo_top_k=None, learning_rate=1e-4))
    for entry in entries:
        assert entry["capo/kl/predicted"] == pytest.approx(entry["capo/kl/measured"], rel=0.01)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 4},
        {"num_iterations": 2},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 1},
        {"mask_truncated_completions": True},
        {"max_completion_length": 1},
        {"gradient_checkpointing": True},
        {"capo_step": "sgd"},
        {"capo_fisher": "expected"},
        {"capo_granularity": "sequence"},
        {"capo_granularity": "group"},
        {"capo_granularity": "batch"},
        {"capo_top_k": 3, "capo_max_missing_mass": 1.0},
        {"capo_top_p": 0.9},
        {"importance_sampling_level": "sequence", "capo_granularity": "sequence"},
        {"beta": 0.1},
        {"max_grad_norm": 0.0},
        {"bf16": True},
    ],
    ids=str,
)
def test_works_with(build, settings):
    entries = logs(build(**(SOME | settings)))
    assert len(entries) == 5
    assert all(math.isfinite(entry["loss"]) for entry in entries)
    assert all(0 <= entry["capo/rejection_rate"] <= 1 for entry in entries)


def test_tied_embeddings(build):
    entries = logs(build(model=make_model(tied=True), **SOME))
    assert all(math.isfinite(entry["capo/kl/measured"]) for entry in entries)


def test_lora_with_a_frozen_head(build):
    trainer = build(peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], r=2), beta=0.05, **SOME)
    entries = logs(trainer)
    assert trainer.planner.step.steps == 5
    assert any(entry["capo/rejection_rate"] > 0 for entry in entries)


def test_zero_advantages_are_accepted_and_change_nothing_by_themselves(build):
    trainer = build(rewards=lambda completions, **kwargs: [1.0] * len(completions))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    entries = logs(trainer)
    assert all(entry["capo/rejection_rate"] == 0 for entry in entries)
    assert all(entry["capo/steps_skipped"] == 0 for entry in entries)
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_a_batch_rejected_whole_skips_the_step_and_is_counted(build):
    """Momentum from accepted steps must not move the weights either."""
    trainer = build(max_steps=4, **SOME)
    weights, moments = [], []

    def look():
        weights.append(trainer.model.lm_head.weight.detach().clone())
        moments.append(trainer.planner.step.steps)
        if len(weights) == 2:
            trainer.planner.thresholds = Thresholds(hessian=(1e9, 1e9))

    trainer.add_callback(Watch(look))
    entries = logs(trainer)
    weights.append(trainer.model.lm_head.weight.detach())
    moved = [not torch.equal(one, other) for one, other in itertools.pairwise(weights)]
    assert moved == [True, True, False, False]
    assert moments == [1, 2, 2, 2]
    assert [entry["capo/steps_skipped"] for entry in entries] == [0, 0, 1, 2]
    assert entries[-1]["capo/rejection_rate"] == 1
    assert ["capo/kl/measured" in entry for entry in entries] == [True, True, False, False]


def test_a_kl_budget_bounds_every_update(build):
    free = logs(build(**SOME))
    held = logs(build(capo_kl_budget=1e-3, capo_kl_control="copy", **SOME))
    assert max(entry["capo/kl/measured"] for entry in free) > 1e-3
    assert all(entry["capo/kl/measured"] <= 1e-3 for entry in held)
    fractions = [entry["capo/kl/fraction"] for entry in held]
    assert all(0 < fraction <= 1 for fraction in fractions), fractions
    assert min(fractions) < 1
    assert held[0]["capo/kl/proposed"] == free[0]["capo/kl/measured"]


def test_a_kl_budget_that_is_never_reached_changes_nothing(build):
    assert_bitwise_equal(
        trajectory(build(capo_kl_budget=1e9, capo_kl_control="copy", **SOME)), trajectory(build(**SOME))
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 4},
        {"num_iterations": 2},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"model": "tied"},
        {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], r=2), "learning_rate": 0.3},
        {"weight_decay": 0.1},
        {"capo_kl_sample": 0.25},
    ],
    ids=str,
)
@pytest.mark.parametrize("control", ["copy", "optimizer"])
def test_a_kl_budget_holds_with(build, control, settings):
    if settings.get("model") == "tied":
        settings = {"model": make_model(tied=True)}
    entries = logs(build(capo_kl_budget=1e-3, capo_kl_control=control, **(OPEN | settings)))
    assert len(entries) == 5
    assert all(0 <= entry["capo/kl/measured"] <= 1e-3 for entry in entries)
    assert any(entry["capo/kl/fraction"] < 1 for entry in entries)


def test_a_step_recomputed_from_adams_state_is_the_copied_one(build):
    settings = OPEN | {"capo_kl_budget": 1e-3, "weight_decay": 0.1}
    one, other = (trajectory(build(capo_kl_control=control, **settings)) for control in ("copy", "optimizer"))
    for name, weight in one[2].items():
        torch.testing.assert_close(weight, other[2][name], rtol=1e-4, atol=1e-6)


def test_the_default_steers_the_learning_rate_and_leaves_no_update_above_the_budget(build):
    settings = {"capo_mode": "trust_region", "max_steps": 30, "capo_kl_budget": 1e-2, "capo_watch": True}
    free = logs(build(capo_mode="monitor", max_steps=30, capo_kl_every=1))
    held = logs(build(**settings))
    assert max(entry["capo/kl/measured"] for entry in free) > 1e-2
    assert all(entry["capo/kl/measured"] <= 1e-2 for entry in held)
    assert held[0]["capo/scale"] == 2**-10
    assert all(after["capo/scale"] <= 2.001 * before["capo/scale"] for before, after in itertools.pairwise(held))
    late = [entry["capo/kl/measured"] for entry in held[15:]]
    assert 0.25e-3 < sum(late) / len(late) < 4e-3  # a tenth of the budget on average
    assert all(entry["learning_rate"] == 1e-2 for entry in held)  # the schedule's own is not touched
    watched = logs(build(**settings | {"capo_fisher_threshold": 1e-5}))
    assert any(entry["capo/rejection_rate"] > 0 for entry in watched)  # told, and not left out
    assert [entry["capo/kl/measured"] for entry in watched] == [entry["capo/kl/measured"] for entry in held]


@pytest.mark.parametrize(("budget", "told"), [(1e-9, True), (1e-2, False)])
def test_a_budget_below_what_rounding_makes_of_no_step_at_all_is_told(build, caplog, budget, told):
    model = make_model().to(torch.bfloat16)
    entries = logs(
        build(model=model, capo_mode="trust_region", capo_kl_budget=budget, capo_kl_sample=0.25, max_steps=3)
    )
    assert 0 <= entries[0]["capo/kl/noise"] < 1e-3
    assert all("capo/kl/noise" not in entry for entry in entries[1:])
    if entries[0]["capo/kl/noise"] > 0.05e-9:
        assert ("rounding alone" in caplog.text) == told


def test_a_step_of_momentum_alone_teaches_the_control_nothing(build):
    """Rewards that are all alike have no advantage, and so no gradient of their own."""
    trainer = build(
        capo_mode="trust_region",
        capo_kl_start=1.0,
        max_steps=4,
        rewards=lambda completions, **_: [1.0] * len(completions),
    )
    entries = logs(trainer)
    assert all(entry["grad_norm"] == 0 for entry in entries)
    assert trainer.optimizer_steps.budget.state_dict() == {"limit": 1e-2, "kl": 0.0, "weight": 0.0}


def test_ten_steps_undone_in_a_row_are_told(build, caplog):
    trainer = build(capo_mode="trust_region", max_steps=12)
    trainer.optimizer_steps.measure_kl = lambda: Moved(math.inf, torch.ones(2))
    entries = logs(trainer)
    assert all(entry["capo/kl/fraction"] == 0 for entry in entries)
    assert "10 steps in a row were over the budget of 0.005 nats" in caplog.text


def test_kl_is_sampled_where_the_advantages_are_largest(build):
    trainer = build(capo_mode="trust_region", capo_watch=True, capo_kl_sample=0.5, max_steps=1)
    seen = []
    measure = trainer.optimizer_steps.measure_kl

    def spy():
        seen.append(
            [
                (forward.sample, batch)
                for forward, batch in zip(trainer.measuring.forwards, planner.micro_batches, strict=True)
            ]
        )
        return measure()

    planner, trainer.optimizer_steps.measure_kl = trainer.planner, spy
    trainer.train()
    for sample, batch in seen[0]:
        inside, outside = batch.advantages[sample].abs(), batch.advantages[~sample].abs()
        assert len(inside) and inside.min() >= outside.max()


def test_a_share_of_the_step(build):
    """`shorten` takes Adam's step times ρ, and `mask` with the share the published mask's step times ρ."""
    for mode, published in (("shorten", {"capo_mode": "off"}), ("mask", {"capo_share": False})):
        trainer = build(**(SOME | {"capo_mode": mode, "capo_share": True, "max_steps": 1}))
        before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        (entry,) = logs(trainer)
        assert 0 < entry["capo/share"] < 1
        assert entry["capo/scale"] == entry["capo/share"]
        whole = build(**(SOME | {"max_steps": 1} | published))
        whole.train()
        for (name, weight), full in zip(trainer.model.named_parameters(), whole.model.parameters(), strict=True):
            step, full_step = weight - before[name], full - before[name]
            torch.testing.assert_close(step, entry["capo/share"] * full_step, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("mode", ["mask", "shorten", "monitor"])
def test_the_share_is_that_of_the_last_layers_gradients_by_autograd(build, loss_type, mode):
    """‖g_acc‖/‖g_all‖ of a head that is the whole model's, from TRL's own gradients with and without the rejected."""
    settings = SOME | {"max_steps": 1, "loss_type": loss_type, "max_grad_norm": 0.0, "capo_top_k": None}
    trainer = build(**settings, capo_mode=mode, capo_share=True)
    advantages = []
    select = trainer._select

    def spy(model, inputs, mask, *rest):
        before = inputs["advantages"][:, None].expand(mask.shape)
        select(model, inputs, mask, *rest)
        keep = mask.clone()
        keep[mask] = trainer.planner.micro_batches[-1].keep
        advantages.append(torch.where(keep, before, 0.0))

    trainer._select = spy
    (entry,) = logs(trainer)

    def norm(given=None):
        """Of the head's gradient in TRL's own loss, with advantages of ours if given."""
        stock = build(GRPOTrainer, GRPOConfig, **{k: v for k, v in settings.items() if not k.startswith("capo")})
        compute, left, found = stock._compute_loss, list(given or []), []
        stock._compute_loss = lambda model, inputs: compute(
            model, inputs | ({"advantages": left.pop(0)} if given else {})
        )
        stock.add_callback(Watch(lambda: found.append(stock.model.lm_head.weight.grad.norm().item())))
        stock.train()
        return found[0]

    assert entry["capo/share"] == pytest.approx(min(1.0, norm(advantages) / norm()), rel=1e-3)


def test_kl_is_measured_at_every_nth_step(build):
    entries = logs(build(max_steps=6, capo_mode="monitor", capo_kl_every=3))
    assert ["capo/kl/measured" in entry for entry in entries] == [False, False, True] * 2


def poison(trainer, step: int = 1) -> None:
    """Make one entry of the head's gradient NaN, at one step."""

    def spoil(gradient):
        gradient = gradient.clone()
        gradient[0, 0] = math.nan if trainer.state.global_step == step else gradient[0, 0]
        return gradient

    trainer.model.lm_head.weight.register_hook(spoil)


@pytest.mark.parametrize(
    "settings",
    [
        {"capo_kl_budget": 1e-3},
        {"capo_kl_budget": 1e-3, "capo_kl_control": "optimizer"},
        {"capo_kl_budget": 1e-3, "capo_kl_control": "learning_rate"},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("clipped", [True, False, None])
def test_a_gradient_that_is_not_finite_skips_the_step(build, settings, clipped):
    """Whether TRL looks at its norm to clip it, only to log it, or (None, as older ones) not at all."""
    trainer = build(max_steps=3, max_grad_norm=1.0 if clipped else 0.0, **OPEN, **settings)
    if clipped is None:
        trainer._get_grad_norm = lambda model, grad_norm=None: grad_norm
    poison(trainer)
    entries = logs(trainer)
    assert [entry["capo/steps_skipped"] for entry in entries] == [0, 1, 1]
    assert [entry["capo/steps_skipped/nonfinite"] for entry in entries] == [0, 1, 1]
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    assert trainer.planner.step.steps == 2


def test_a_loss_that_is_not_finite_skips_the_step_also_where_tokens_are_rejected(build):
    trainer = build(max_steps=3, **SOME)
    compute = trainer._compute_loss
    trainer._compute_loss = lambda *each: compute(*each) * (math.nan if trainer.state.global_step == 1 else 1)
    entries = logs(trainer)
    assert entries[1]["capo/rejection_rate"] > 0
    assert [entry["capo/steps_skipped/nonfinite"] for entry in entries] == [0, 1, 1]


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_is_left_to_trl_while_watching(build, max_grad_norm):
    runs = []
    for mode in ("off", "monitor"):
        trainer = build(capo_mode=mode, max_steps=2, max_grad_norm=max_grad_norm)
        poison(trainer)
        trainer.train()
        runs.append(trainer)
    for one, other in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert runs[1].planner.steps_skipped == 0
    assert runs[1].planner.step.steps == 2
    assert runs[1].planner.step.moments(torch.arange(8))[0].isnan().any()


@pytest.mark.parametrize("max_grad_norm", [0.05, 0.0])
@pytest.mark.parametrize("mode", ["mask", "monitor"])
def test_the_step_model_stands_still_where_a_loss_scaler_skips_the_optimizer(build, mode, max_grad_norm):
    trainer = build(capo_mode=mode, max_steps=4, max_grad_norm=max_grad_norm, capo_top_k=None, **OPEN)
    accelerator = trainer.accelerator  # Accelerate has fp16 for accelerators only: what matters of it, on a CPU
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    accelerator.unscale_gradients = lambda optimizer=None: accelerator.scaler.unscale_(torch_optimizer(trainer))
    poison(trainer, step=2)
    entries = logs(trainer)
    head = trainer.model.lm_head.weight
    state = torch_optimizer(trainer).state[head]
    p, q = trainer.planner.step.moments(torch.arange(len(head)))
    assert accelerator.scaler.get_scale() == 4.0
    assert trainer.planner.step.steps == int(state["step"]) == 3
    assert state["exp_avg"].isfinite().all()
    torch.testing.assert_close(p, -state["exp_avg"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(q, state["exp_avg_sq"], rtol=1e-4, atol=1e-10)
    assert entries[-1]["capo/steps_skipped/nonfinite"] == 1


@pytest.mark.parametrize("control", ["copy", "optimizer", "learning_rate"])
def test_a_control_hears_nothing_of_a_step_that_was_skipped(build, control):
    """A predicted KL of zero set the scale back to one, and the next steps were planned too long."""
    trainer = build(max_steps=4, capo_kl_budget=1e-4, capo_kl_control=control, **OPEN)
    poison(trainer, step=2)
    heard = []

    def listen(name):
        call = getattr(trainer.optimizer_steps.budget, name)

        def spy(*args, **kwargs):
            heard.append((trainer.state.global_step, name))
            return call(*args, **kwargs)

        setattr(trainer.optimizer_steps.budget, name, spy)

    for name in ("before_step", "after_step"):
        listen(name)
    entries = logs(trainer)
    assert heard == [call for step in (0, 1, 3) for call in ((step, "before_step"), (step + 1, "after_step"))]
    assert [entry.keys() >= {"capo/kl/measured", "capo/kl/fraction"} for entry in entries] == [True, True, False, True]
    assert not any("kl/measured" in name or "fraction" in name for name in entries[2])
    assert trainer._get_learning_rate() == trainer.args.learning_rate


def test_the_learning_rate_that_was_used_is_logged(build):
    trainer = build(capo_kl_budget=1e-3, capo_kl_control="learning_rate", **OPEN)
    used = []
    trainer.add_callback(Watch(lambda: used.append(torch_optimizer(trainer).param_groups[0]["lr"])))
    entries = logs(trainer)
    assert all(entry["learning_rate"] == 1e-2 for entry in entries)
    assert [entry["capo/learning_rate"] for entry in entries] == used
    assert min(used) < 1e-2


def test_reinforce_takes_the_raw_reward(build):
    trainer = build(capo_mode="monitor", capo_advantage="reward", loss_type="dr_grpo", max_steps=1)
    seen = []
    select = trainer._select
    trainer._select = lambda model, inputs, *rest: (
        seen.append(inputs["advantages"]),
        select(model, inputs, *rest),
    )[1]
    (entry,) = logs(trainer)
    advantages = torch.cat(seen)
    assert float(advantages.mean()) == pytest.approx(entry["reward"], abs=1e-6)
    assert (advantages >= 0).all()
    assert sorted(trainer._logs["advantages"]) == pytest.approx(sorted(advantages.tolist()))


def test_the_moments_of_reused_rollouts_follow_the_clipped_ratio(build):
    """On the second pass over the same rollouts the loss clips some tokens: their weight is zero."""
    trainer = build(capo_mode="monitor", num_iterations=2, max_steps=2, learning_rate=0.1, epsilon=0.01)
    weights = []
    trainer.add_callback(
        Watch(lambda: weights.append(torch.cat([batch.weights for batch in trainer.planner.micro_batches])))
    )
    trainer.train()
    assert (weights[0] != 0).all()
    assert (weights[1] == 0).any()


def test_buffered_inputs_are_not_changed(build):
    trainer = build(num_iterations=2, max_steps=2, **SOME)
    shapes = []
    trainer.add_callback(
        Watch(lambda: shapes.append([inputs["advantages"].dim() for inputs in trainer._buffered_inputs]))
    )
    trainer.train()
    assert shapes == [[1, 1], [1, 1]]


# ---- what must raise ---------------------------------------------------------------------------------------------


def test_a_hook_that_does_not_fire_raises(build):
    trainer = build(**SOME)
    elsewhere = torch.nn.Identity()
    trainer.model.base_model.register_forward_hook = elsewhere.register_forward_hook
    with pytest.raises(RuntimeError, match="fired 0 times"):
        trainer.train()


def test_a_loss_that_bypasses_the_log_probs_raises(build, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs: model.lm_head.weight.sum())
    with pytest.raises(RuntimeError, match="never asked for its log-probabilities"):
        build(**SOME).train()


def test_a_loss_that_ignores_the_mask_raises(build):
    trainer = build(**SOME)
    # a trainer that reads the advantages before the log-probabilities would see TRL's, not CAPO's
    trainer._select = lambda model, inputs, *rest: CAPOTrainer._select(trainer, model, dict(inputs), *rest)
    with pytest.raises(RuntimeError, match="did not read the advantages"):
        trainer.train()


def test_hidden_states_that_are_not_those_of_the_loss_raise(build):
    trainer = build(**SOME)
    head = trainer.backbone.head
    trainer.backbone.head = lambda model: replace(head(model), scale=2.0)
    with pytest.raises(RuntimeError, match="differ from the loss's"):
        trainer.train()


def test_gradients_that_never_arrive_raise(build):
    trainer = build(**SOME)
    trainer.add_callback(Watch(lambda: None))
    select = trainer._select

    def deaf(model, inputs, mask, hidden, logps):
        select(model, inputs, mask, hidden, logps.detach().requires_grad_())

    trainer._select = deaf
    with pytest.raises(RuntimeError, match="never reached the log-probabilities"):
        trainer.train()


def test_models_without_a_linear_head_are_refused(build):
    model = make_model()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        build(model=model)


def test_a_plain_grpo_config_is_refused(build):
    with pytest.raises(TypeError, match="takes a CAPOConfig"):
        build(config=GRPOConfig)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capo_mode": "on"}, "capo_mode='on' is not one of off, monitor, mask"),
        ({"capo_fisher_threshold": -1.0}, "capo_fisher_threshold=-1.0"),
        ({"capo_hessian_low": 1.0, "capo_hessian_high": -1.0}, "swap"),
        ({"capo_top_k": 0}, "capo_top_k=0"),
        ({"capo_max_missing_mass": 2.0}, "capo_max_missing_mass"),
        ({"loss_type": "vespo"}, "no denominators for loss_type='vespo'"),
        ({"importance_sampling_level": "sequence"}, "capo_granularity"),
        ({"capo_kl_budget": 0.0}, "capo_kl_budget=0.0"),
        ({"capo_kl_budget": 1.0, "capo_mode": "monitor"}, "capo_kl_budget changes the run"),
        ({"capo_kl_control": "hope"}, "capo_kl_control='hope' is not one of learning_rate"),
        ({"capo_kl_start": 0.0}, "capo_kl_start=0.0 is a share"),
        ({"capo_kl_every": 0}, "capo_kl_every=0"),
        ({"capo_kl_sample": 0.0}, "capo_kl_sample=0.0"),
        ({"trust_remote_code": True}, "trust_remote_code"),
    ],
)
def test_settings_that_cannot_work_are_named(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


@pytest.mark.parametrize("instead", [{"capo_soft": True}, {"capo_penalty": 2.0}])
def test_weights_in_place_of_a_mask(build, instead):
    stock = trajectory(build(GRPOTrainer, GRPOConfig))
    trainer = build(capo_mode="mask", **SOME, **instead)
    weighed = trajectory(trainer)
    assert weighed[0] != stock[0]
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(0 < entry["capo/weight"] <= 1 for entry in entries)
    assert all(entry["capo/rejection_rate"] == 0 for entry in entries)
    assert entries[0]["capo/weight"] < 1
    assert entries[0]["capo/batch_accepted/m_f"] != entries[0]["capo/batch/m_f"]


@pytest.mark.parametrize("instead", [{"capo_soft": True, **OPEN}, {"capo_penalty": 1e-30}])
def test_weights_of_one_are_trl(build, instead):
    stock = trajectory(build(GRPOTrainer, GRPOConfig))
    weighed = trajectory(build(capo_mode="mask", **instead))
    assert weighed[0] == stock[0]
    assert all(torch.equal(weighed[2][name], stock[2][name]) for name in stock[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capo_penalty": 0.0}, "capo_penalty=0.0 must be above 0"),
        ({"capo_penalty": 1.0, "capo_soft": True}, "use one of them"),
        ({"capo_soft": True, "capo_granularity": "sequence"}, "one by one"),
    ],
)
def test_settings_of_weights_that_contradict_one_another(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_an_optimizer_whose_step_is_not_known_is_refused_before_the_first(build):
    settings = {"capo_kl_budget": 1e-3, "capo_kl_control": "optimizer"}
    with pytest.raises(ValueError, match="optim='sgd' is another: use optim='adamw_torch', or capo_kl_control='copy'"):
        build(optim="sgd", **settings)
    model = make_model()
    for optimizer in (
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.optim.AdamW(model.parameters(), amsgrad=True),
    ):
        with pytest.raises(ValueError, match="use 'copy'"):
            build(model=model, optimizers=(optimizer, None), **settings)
    trainer = build(max_steps=1, **settings)
    trainer.create_optimizer = lambda *_: setattr(trainer, "optimizer", torch.optim.SGD(trainer.model.parameters()))
    trainer._compute_loss = lambda *_: pytest.fail("the first loss is too late")
    with pytest.raises(ValueError, match="use 'copy'"):
        trainer.train()


# ---- steps without tokens ----------------------------------------------------------------------------------------


def leave_out(trainer, empty) -> None:
    """Mask out the completions of which `empty(step, row)` holds, as TRL does with truncated ones."""
    generate = trainer._generate_and_score_completions

    def generated(inputs):
        output = generate(inputs)
        for row in range(len(output["completion_mask"])):
            if empty(trainer.state.global_step, row):
                output["completion_mask"][row] = 0
        return output

    trainer._generate_and_score_completions = generated


@pytest.mark.parametrize("dropout", [False, True])
def test_kl_is_sampled_among_completions_that_have_tokens(build, dropout):
    """The sample was the first completion, and the mean of nothing where that had no tokens: a good step was undone."""
    settings = {"capo_kl_sample": 0.25, "capo_kl_budget": 10.0, "gradient_accumulation_steps": 1}
    if dropout:
        settings |= STOCHASTIC["attention_dropout"]()
    trainer = build(**OPEN, **settings)
    leave_out(trainer, lambda step, row: row > 0)  # TRL shuffles them afterwards
    for entry in logs(trainer):
        assert entry["capo/kl/fraction"] == 1.0
        assert 0 < entry["capo/kl/measured"] < 10.0


@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize("uses", [1, 2])
def test_kl_is_sampled_from_the_step_and_not_from_each_of_its_micro_batches(build, watch, uses):
    """With micro-batches of one, all of them were measured, whatever the share; now the largest of the step are."""
    trainer = build(
        capo_mode="trust_region",
        capo_watch=watch,
        capo_kl_sample=0.25,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        num_iterations=uses,
        max_steps=4,
    )
    measure, steps = trainer.optimizer_steps.measure_kl, []

    def measure_kl():
        forwards, inputs = trainer.measuring.forwards, trainer._buffered_inputs
        ran = [i for i, forward in enumerate(forwards) if forward.run is not None]
        assert ran == [i for i, forward in enumerate(forwards) if forward.sample.any()]
        steps.append(([float(each["advantages"].abs().max()) for each in inputs], ran))
        moved = measure()
        assert len(moved.kl) == sum(int(forward.sample.sum()) for forward in forwards)
        return moved

    trainer.optimizer_steps.measure_kl = measure_kl
    for entry in logs(trainer):
        assert 0 < entry["capo/kl/measured"] <= trainer.args.kl_budget
    for advantages, ran in steps:
        assert len(ran) == 2
        assert sorted(advantages[i] for i in ran) == sorted(advantages)[-2:]
    assert len({tuple(ran) for _, ran in steps}) > 1


def test_an_update_is_measured_alike_however_its_step_is_divided(build):
    runs = [
        logs(
            build(
                capo_mode="trust_region",
                capo_kl_sample=0.25,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
                max_steps=3,
            )
        )
        for size in (8, 4, 1)
    ]
    for name in ("capo/kl/measured", "capo/learning_rate"):
        whole, *divided = [[entry[name] for entry in run] for run in runs]
        assert all(each == pytest.approx(whole, rel=1e-3) for each in divided), name


@pytest.mark.parametrize("control", [None, "copy", "optimizer", "learning_rate"])
def test_a_step_without_tokens_is_not_measured_and_left_out_under_a_budget(build, control):
    budget = {} if control is None else {"capo_kl_budget": 10.0, "capo_kl_control": control}
    trainer = build(max_steps=3, **OPEN, **budget)
    leave_out(trainer, lambda step, row: step == 1)
    weights = []
    trainer.add_callback(Watch(lambda: weights.append(trainer.model.lm_head.weight.detach().clone())))
    entries = logs(trainer)
    assert ["capo/kl/measured" in entry for entry in entries] == [True, False, True]
    assert entries[2]["capo/kl/measured"] > 0
    # without a budget it is TRL's, whose momentum moves the weights
    assert entries[2]["capo/steps_skipped"] == (0 if control is None else 1)
    assert torch.equal(weights[1], weights[2]) == (control is not None)


# ---- counts, and which steps are logged --------------------------------------------------------------------------


def test_totals_are_logged_as_they_stand_and_not_in_the_mean_of_the_window(build):

    def entries(logging_steps):
        trainer = build(max_steps=4, logging_steps=logging_steps, **SOME)
        poison(trainer, step=3)
        return logs(trainer)

    windows, steps = entries(2), entries(1)
    assert len(windows) == 2
    for name in ("capo/steps_skipped", "capo/steps_skipped/nonfinite", "capo/completions", "capo/accepted_tokens"):
        assert [entry[name] for entry in windows] == [steps[1][name], steps[3][name]], name
    assert windows[1]["capo/steps_skipped"] == 1
    assert windows[0]["capo/completions"] == 16


def test_a_step_of_which_only_tokens_without_an_advantage_were_accepted_is_skipped(build):
    """Its gradient is zero, and momentum would move the weights all the same."""
    trainer = build(max_steps=3, rewards=lambda completions, **_: [0.0] * 4 + wants_even_words(completions)[4:], **SOME)
    weights = []

    def look():
        weights.append(trainer.model.lm_head.weight.detach().clone())
        if len(weights) == 1:
            trainer.planner.rule = lambda layer, advantages, shifts, before: advantages == 0

    trainer.add_callback(Watch(look))
    entries = logs(trainer)
    weights.append(trainer.model.lm_head.weight.detach())
    assert [not torch.equal(one, other) for one, other in itertools.pairwise(weights)] == [True, False, False]
    assert [entry["capo/steps_skipped"] for entry in entries] == [0, 1, 2]
    assert 0 < entries[-1]["capo/rejection_rate"] < 1


def test_a_run_that_skips_most_of_its_steps_says_so_at_its_end(build, caplog):
    build(max_steps=3, capo_fisher_threshold=1e-30).train()
    (message,) = [record.getMessage() for record in caplog.records if "were skipped" in record.getMessage()]
    assert message.startswith("3 of 3 steps were skipped, 0 of them")
    caplog.clear()
    build(max_steps=3, **SOME).train()
    assert "were skipped" not in caplog.text


def test_a_training_broken_off_in_the_middle_of_a_step_leaves_nothing_to_the_next(build):
    trainer = build(gradient_accumulation_steps=2, max_steps=2, capo_tokens_every=1, **SOME)
    compute = trainer._compute_loss
    losses, seen = [], []

    def interrupted(*args):
        losses.append(compute(*args))
        if len(losses) == 1:
            raise KeyboardInterrupt
        return losses[-1]

    trainer._compute_loss = interrupted
    trainer.add_callback(
        Watch(lambda: seen.append((len(trainer.planner.micro_batches), len(trainer.measuring.forwards))))
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert seen == [(2, 2), (2, 2)]
    assert trainer.planner.step.steps == 2


def test_kl_is_measured_at_the_last_step_of_an_epoch_where_epochs_are_logged(build):
    trainer = build(max_steps=-1, num_train_epochs=2, logging_strategy="epoch", capo_mode="monitor")
    trainer.train_dataset = trainer.train_dataset.select(range(6))  # three steps of two prompts, four times
    measured = []
    measure = trainer.planner.measured_kl
    trainer.planner.measured_kl = lambda *args: (measured.append(trainer.state.global_step), measure(*args))[1]
    entries = logs(trainer)
    assert [entry["step"] for entry in entries] == measured == [3, 6]
    assert all(entry["capo/kl/measured"] > 0 and "capo/token/m_f/mean" in entry for entry in entries)


def test_kl_is_measured_where_a_run_ends_in_the_middle_of_an_epoch(build):
    (entry,) = logs(build(max_steps=3, logging_strategy="epoch", capo_mode="monitor"))
    assert entry["capo/kl/measured"] > 0


# ---- a network that draws random numbers -------------------------------------------------------------------------


def make_random_model(kind: str):
    model = make_model()
    if kind == "attention_dropout":
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
    return model


LORA = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_dropout=0.1, init_lora_weights=False)
STOCHASTIC = {
    "lora_dropout": lambda: {"peft_config": LORA},
    "attention_dropout": lambda: {"model": make_random_model("attention_dropout")},
    "neftune": lambda: {"neftune_noise_alpha": 5.0},
}


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}, {"capo_kl_sample": 0.5}], ids=str)
@pytest.mark.parametrize("kind", STOCHASTIC)
def test_kl_is_measured_with_the_random_numbers_of_the_loss(build, kind, more):
    settings = STOCHASTIC[kind]() | more | {"learning_rate": 1e-12, "max_steps": 2}
    for entry in logs(build(capo_mode="monitor", **settings)):
        assert abs(entry["capo/kl/measured"]) < 1e-6  # with others it was about 1


def test_kl_is_measured_with_the_random_numbers_of_the_loss_through_the_scoring_of_trl(build, monkeypatch):
    monkeypatch.setattr("capo_rl.trainers.measuring._WHOLE", ())
    test_kl_is_measured_with_the_random_numbers_of_the_loss(build, "attention_dropout", {})


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_watching_a_random_network_is_trl_bit_for_bit(build, kind):
    stock = trajectory(build(GRPOTrainer, GRPOConfig, **STOCHASTIC[kind]()))
    assert_bitwise_equal(trajectory(build(capo_mode="monitor", capo_kl_every=1, **STOCHASTIC[kind]())), stock)


def test_a_kl_budget_does_not_undo_the_steps_of_a_random_network(build):
    for entry in logs(build(learning_rate=1e-6, capo_kl_budget=1e-3, **OPEN, **STOCHASTIC["attention_dropout"]())):
        assert entry["capo/kl/fraction"] == 1.0
        assert entry["capo/kl/measured"] < 1e-3
