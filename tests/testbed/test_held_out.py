"""What is measured on problems that a run never sees: it is what it says, and the run doesn't feel it."""

import json
import math

import pytest
import torch

from capo_rl.runs.models import load_model, load_tokenizer
from capo_rl.settings.recipe import read_recipe
from capo_rl.testbed.held_out import perplexity, sampled, sampled_accuracy
from capo_rl.trainers.train import make_trainer

ROWS = [{"problem": f"Compute {a}+{b} mod 10.\n"} for a in range(3) for b in range(3)]


@pytest.fixture(scope="module")
def policy():
    return load_model("embedded", dtype="float32"), load_tokenizer("embedded")


def test_perplexity_is_that_of_a_dense_model(policy):
    model, tokenizer = policy
    pairs = sampled(model, tokenizer, ROWS, 12)
    total, count = 0.0, 0
    for prompt, reply in pairs:
        for at, token in enumerate(reply):  # a token at a time
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + reply[:at]])).logits[0, -1].double()
            total -= math.log(logits.softmax(-1)[token])
            count += 1
    assert perplexity(model, pairs) == pytest.approx(math.exp(total / count), rel=1e-4)


def test_perplexity_of_a_broken_model_is_infinite_and_not_an_error(policy):
    model, tokenizer = policy
    pairs = sampled(model, tokenizer, ROWS[:2], 4)
    weight = model.get_output_embeddings().weight
    kept = weight.detach().clone()
    try:
        weight.data.fill_(math.nan)
        assert perplexity(model, pairs) == math.inf
    finally:
        weight.data.copy_(kept)


def test_samples_end_where_they_end_and_leave_the_random_numbers_alone(policy):
    model, tokenizer = policy
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model.train()
    pairs = sampled(model, tokenizer, ROWS, 40)
    assert model.training
    assert torch.equal(torch.rand(3), expected)
    prompts = [tokenizer(row["problem"])["input_ids"] for row in ROWS]
    assert [prompt for prompt, _ in pairs] == prompts  # nothing of the padding
    assert all(tokenizer.eos_token_id not in reply[:-1] for _, reply in pairs)
    rows = [row | {"constraints": {"contains": ["no-such-word"]}} for row in ROWS]
    assert sampled_accuracy(model, tokenizer, rows, 40) == 0.0
    rows = [row | {"constraints": {"lacks": ["no-such-word"]}} for row in ROWS]
    assert sampled_accuracy(model, tokenizer, rows, 40) == 1.0


def test_a_recipe_with_constraints_is_rewarded_by_them(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row | {"constraints": {"least_words": 1}}) for row in ROWS))
    recipe = tmp_path / "recipe.yaml"
    settings = {
        "model_name_or_path": "embedded",
        "dataset_name": str(data),
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 6,
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "capo_max_missing_mass": 1.0,
    }
    recipe.write_text(json.dumps(settings))  # which is YAML
    trainer, dropped = make_trainer(read_recipe(str(recipe)))
    assert dropped == {"ungradable": 0, "too_long": 0}
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert entry["reward"] == 1.0 - entry["constraints/broken/least_words"]
