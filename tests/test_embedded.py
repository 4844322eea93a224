"""The model inside the package: exact text, small, calibrated to solve half of its problems, with a long tail."""

import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from capo_rl.runs.models import load_model, load_tokenizer, locate
from capo_rl.tasks.arithmetic import WORDS, problems

FOLDER = Path(locate("embedded").name)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


@pytest.fixture(scope="module")
def model():
    return load_model("embedded").eval()


@pytest.fixture(scope="module")
def samples(model, tokenizer):
    """256 problems and a completion of each, sampled as the model's own settings say."""
    rows = list(islice(problems(seed=1), 256))
    prompts = tokenizer([row["problem"] for row in rows], return_tensors="pt")
    torch.manual_seed(0)
    ids = model.generate(**prompts, max_new_tokens=40)[:, prompts["input_ids"].shape[1] :]
    return rows, ids, tokenizer.batch_decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("terms", [2, 5, 8, 16])
def test_text_comes_back_exactly(tokenizer, terms):
    for row in islice(problems(0, terms), 100):
        text = row["problem"] + row["solution"]
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer(row["problem"])["input_ids"] + tokenizer(row["solution"])["input_ids"]


def test_every_word_is_one_token(tokenizer):
    ids = tokenizer([f" {word}" for word in WORDS])["input_ids"]
    assert {len(row) for row in ids} == {1}
    assert len({row[0] for row in ids}) == len(WORDS)


def test_other_text_is_an_error(tokenizer):
    with pytest.raises(Exception, match="UNK"):
        tokenizer("Compute 2*3 mod 10.\n")


def test_files_are_small_and_plain():
    names = {file.name for file in FOLDER.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 3e6


def test_model_is_ready_to_train(model, tokenizer):
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.padding_side == "left" and tokenizer.chat_template is None
    for settings in (model.config, model.generation_config):
        assert (settings.pad_token_id, settings.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    plain = model.generation_config
    assert (plain.do_sample, plain.temperature, plain.top_k, plain.top_p) == (True, 1.0, 0, 1.0)


def test_half_of_the_sampled_answers_are_right(samples, tokenizer):
    rows, ids, texts = samples
    boxes = [re.findall(r"\\boxed\{(.*?)\}$", text) for text in texts]
    right = sum(box == [row["answer"]] for box, row in zip(boxes, rows, strict=True)) / len(rows)
    assert 0.35 < right < 0.65  # 0.5 and five standard deviations
    assert (ids == tokenizer.eos_token_id).any(1).float().mean() > 0.98


def test_padding_changes_nothing(model, tokenizer):
    long, short = next(problems(0, terms=8))["problem"], next(problems(0, terms=2))["problem"]
    settings = {"do_sample": False, "max_new_tokens": 11}
    alone = model.generate(**tokenizer(short, return_tensors="pt"), **settings)[0, -11:]
    padded = model.generate(**tokenizer([long, short], return_tensors="pt", padding=True), **settings)[1, -11:]
    assert torch.equal(alone, padded)


def test_sampled_words_have_a_long_tail(samples):
    counts = Counter(word for text in samples[2] for word in re.findall(r"=\d ([a-z]+)", text))
    assert counts[WORDS[0]] / counts.total() == pytest.approx(0.148, abs=0.05)  # Zipf's law for 480 words
    assert 150 < len(counts) < len(WORDS)
    assert sum(counts[word] <= 2 for word in WORDS) > len(WORDS) / 2
