"""A sampler that lags samples with old weights and says how likely its tokens were; masks look how far away it is."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import TrainerCallback

from capo_rl.testbed.off_policy import MASKS, Lag, drift
from conftest import make_model

SETTINGS = {"capo_mode": "monitor", "gradient_accumulation_steps": 1, "max_steps": 4}


class Models(TrainerCallback):
    """The models that each step starts from."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        mine = make_model()  # a copy would have the forward pass that TRL put into the original
        mine.load_state_dict(model.state_dict())
        self.seen.append(mine)


def trained(trainer, lag=None):
    """The trainer after training, the models that its steps started from, and the batches it trained on."""
    models, batches = Models(), []
    trainer.add_callback(models)
    if lag is not None:
        trainer.add_callback(Lag(trainer, **lag))
    inner = trainer._compute_loss

    def loss(model, inputs):
        batches.append(dict(inputs))
        return inner(model, inputs)

    trainer._compute_loss = loss
    trainer.train()
    return trainer, models.seen, batches


def log_probs(model, batch):
    """log π(a) [B, T] by the model alone."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    places = (attention.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention, position_ids=places).logits
    length = batch["completion_ids"].shape[1]
    scores = logits[:, -length - 1 : -1].log_softmax(-1)
    return scores.gather(-1, batch["completion_ids"][..., None])[..., 0]


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


@pytest.mark.parametrize("correction", [None, "token_truncate", "sequence_mask"])
def test_no_lag_is_the_run_without_one(build, correction):
    plain, _, _ = trained(build(**SETTINGS))
    lagged, models, batches = trained(build(**SETTINGS), {"steps": 0, "correction": correction})
    assert same_weights(plain, lagged)
    assert not torch.equal(models[0].lm_head.weight, models[-1].lm_head.weight)
    assert [entry["loss"] for entry in plain.state.log_history[:-1]] == [
        entry["loss"] for entry in lagged.state.log_history[:-1]
    ]
    assert all(entry["off_policy/kl"] == 0 for entry in lagged.state.log_history[:-1])
    assert len(batches) == 4 and all("sampling_per_token_logps" in batch for batch in batches)


@pytest.mark.parametrize(("steps", "uses"), [(1, 1), (2, 1), (1, 2)])
def test_the_sampler_has_the_weights_of_so_many_steps_ago(build, steps, uses):
    trainer = build(**SETTINGS, num_iterations=uses)
    generated = []
    inner = trainer._generate_single_turn

    def generate(*args, **kwargs):
        generated.append(trainer.model.lm_head.weight.detach().clone())
        return inner(*args, **kwargs)

    trainer._generate_single_turn = generate
    _, models, batches = trained(trainer, {"steps": steps, "correction": "token_truncate"})
    assert len(batches) == 4 and len(generated) == 4 // uses
    for step in range(0, 4, uses):
        batch, old, present = batches[step], models[max(0, step - steps)], models[step]
        mask = batch["completion_mask"].bool()
        assert torch.equal(generated[step // uses], old.lm_head.weight)
        of_sampler, of_policy = log_probs(old, batch), log_probs(present, batch)
        torch.testing.assert_close(batch["sampling_per_token_logps"][mask], of_sampler[mask])
        torch.testing.assert_close(batch["old_per_token_logps"][mask], of_policy[mask])
        torch.testing.assert_close(
            batch["importance_sampling_ratio"][mask], (of_policy - of_sampler).exp()[mask].clamp(max=3.0)
        )
        assert (step == 0) == torch.equal(of_sampler[mask], of_policy[mask])
        away = (of_policy - of_sampler)[mask]
        kl = (away.exp() - 1 - away).mean().item()
        assert trainer.state.log_history[step]["off_policy/kl"] == pytest.approx(kl, rel=1e-3, abs=1e-7)


def test_a_correction_changes_the_run_and_none_does_not_weigh(build):
    runs = {
        how: trained(build(**SETTINGS), {"steps": 2, "correction": how})
        for how in (None, "token_truncate", "sequence_mask")
    }
    assert not any("importance_sampling_ratio" in batch for batch in runs[None][2])
    assert runs["sequence_mask"][2][0]["importance_sampling_ratio"].shape == (4, 1)
    assert not same_weights(runs[None][0], runs["token_truncate"][0])


def test_the_policy_is_as_it_was_where_the_sampler_fails(build):
    trainer = build(**SETTINGS)

    def fails(*args, **kwargs):
        raise RuntimeError("the sampler is gone")

    trainer._generate_single_turn = fails
    lag = Lag(trainer, 1)
    lag.kept.append([torch.zeros_like(weight) for weight in trainer.model.parameters()])
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(RuntimeError, match="the sampler is gone"):
        lag.sample([[3, 4]])
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


def test_a_lag_that_is_none_is_refused(build):
    with pytest.raises(ValueError, match="steps=-1 of lag can't be less than 0"):
        Lag(build(**SETTINGS), -1)


# Three completions: 0.5 up to 0.8; 0.5 down to 0.1 and a pad that counts nowhere; as it was.
PI = torch.tensor([[0.8, 0.5], [0.1, 0.9], [0.4, 0.4]]).log()
MU = torch.tensor([[0.5, 0.5], [0.5, 0.1], [0.4, 0.4]]).log()
TOKENS = torch.tensor([[1, 1], [1, 0], [1, 1]])
UP, DOWN = torch.ones(3, 1), -torch.ones(3, 1)


def kept(name, advantages, bound):
    return (MASKS[name](advantages, PI, MU, TOKENS, bound).expand(3, 2) | (TOKENS == 0)).tolist()


def test_total_variation_rejects_tokens_that_would_go_further():
    assert kept("total_variation", UP, 0.2) == [[False, True], [True, True], [True, True]]
    assert kept("total_variation", DOWN, 0.2) == [[True, True], [False, True], [True, True]]
    assert kept("total_variation", DOWN, 0.41) == [[True, True]] * 3


@pytest.mark.parametrize("advantages", [UP, DOWN])
def test_whole_completions_are_rejected_by_their_worst_token_or_their_mean(advantages):
    assert kept("largest_ratio", advantages, 0.4) == [[False, False], [False, True], [True, True]]
    assert kept("largest_ratio", advantages, 1.0) == [[True, True], [False, True], [True, True]]  # log 1.6, log 5
    first, second = (1.6 - 1 - math.log(1.6)) / 2, 0.2 - 1 + math.log(5)  # means over two tokens, and over one
    assert kept("mean_kl", advantages, 0.99 * first) == [[False, False], [False, True], [True, True]]
    assert kept("mean_kl", advantages, 1.01 * first) == [[True, True], [False, True], [True, True]]
    assert kept("mean_kl", advantages, 1.01 * second) == [[True, True]] * 3


def test_trls_mask_rejects_negative_completions_only():
    assert kept("negative", UP, 0.5) == [[True, True]] * 3
    assert kept("negative", DOWN, 0.5) == [[True, True], [False, True], [True, True]]


@pytest.mark.parametrize("name", MASKS)
def test_fresh_completions_are_kept(name):
    for advantages in (UP, DOWN):
        assert MASKS[name](advantages, PI, PI, TOKENS, 1e-6).all()


def test_trls_own_mask_by_its_name_is_its_field(build):
    uses = {**SETTINGS, "num_iterations": 2, "learning_rate": 5e-2}
    of_field, _, _ = trained(build(**uses, off_policy_mask_threshold=1e-3))
    named = build(**uses)
    drift(named, "negative", 1e-3)
    named, _, _ = trained(named)
    plain, _, _ = trained(build(**uses))
    assert same_weights(of_field, named) and not same_weights(plain, named)
    shares = [entry["off_policy/rejected"] for entry in named.state.log_history[:-1]]
    assert shares[0] == 0 and 0 < max(shares) <= 1


def test_rejected_tokens_have_no_gradient_and_the_sampler_is_the_lagging_one(build):
    trainer = build(**SETTINGS)
    drift(trainer, "total_variation", 1e-3)
    gradients = []
    score = trainer._get_per_token_logps_and_entropies

    def watched(*args, **kwargs):
        logps, *more = score(*args, **kwargs)
        if logps.requires_grad:
            logps.retain_grad()
            gradients.append(logps)
        return logps, *more

    trainer._get_per_token_logps_and_entropies = watched
    _, models, batches = trained(trainer, {"steps": 1})
    rejected = 0
    for step, (batch, logps) in enumerate(zip(batches, gradients, strict=True)):
        mask = batch["completion_mask"].bool()
        away = log_probs(models[step], batch).exp() - log_probs(models[max(0, step - 1)], batch).exp()
        out = mask & (away.abs() > 1e-3) & (away * batch["advantages"][:, None] > 0)
        assert not logps.grad[out].any()
        assert logps.grad[mask & ~out & (batch["advantages"][:, None] != 0)].all()
        rejected += int(out.sum())
        assert trainer.state.log_history[step]["off_policy/rejected"] == pytest.approx((out.sum() / mask.sum()).item())
    assert rejected


@pytest.mark.parametrize(
    ("name", "bound", "message"),
    [
        ("dice", 0.2, "drift 'dice' is not one of total_variation, largest_ratio"),
        ("mean_kl", 0, "bound=0 of drift 'mean_kl' must be above 0"),
    ],
)
def test_masks_that_are_none_are_refused(build, name, bound, message):
    with pytest.raises(ValueError, match=message):
        drift(build(**SETTINGS), name, bound)
