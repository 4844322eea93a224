"""Evaluations with the embedded model on made-up benchmarks: the same completions whatever stopped them."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from itertools import islice

import numpy as np
import pytest
import torch

import capo_rl.evaluation.evaluate as module
from capo_rl.answers import Rule
from capo_rl.cli import main
from capo_rl.evaluation.benchmarks import BENCHMARKS, Problem
from capo_rl.evaluation.evaluate import Settings, evaluate
from capo_rl.evaluation.folder import EvaluationError, encoded, read_evaluation
from capo_rl.evaluation.generation import Completion, Sampling, choose_backend, encode, load_generator
from capo_rl.evaluation.regrade import regrade
from capo_rl.evaluation.summary import compare, summarize
from capo_rl.runs.models import ModelError
from capo_rl.runs.records import LOCK, RunFolderError, sole_writer
from capo_rl.tasks import arithmetic
from conftest import make_model, make_tokenizer

SMALL = Settings("embedded", samples=3, temperature=1.0, top_p=1.0, max_new_tokens=60, batch_size=8)


class Killed(BaseException):
    pass


def sums(name: str, count: int = 10, secret: bool = False) -> list[Problem]:
    """Sums of 2 to 5 digits, so that prompts and completions differ in length."""
    rows = [row for terms in (2, 3, 4, 5) for row in islice(arithmetic.problems(seed=1, terms=terms), count)]
    return [
        Problem(name, f"{name}/{i}", row["problem"], row["answer"], Rule(), secret) for i, row in enumerate(rows[::4])
    ]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """The eight benchmarks, each of ten sums."""
    monkeypatch.setattr(module, "load_benchmark", lambda name, folder=None: sums(name, secret=name == "gpqa_diamond"))
    for name, benchmark in BENCHMARKS.items():
        monkeypatch.setitem(BENCHMARKS, name, dataclasses.replace(benchmark, count=10, folder_count=None))


@pytest.fixture(scope="module")
def embedded():
    return load_generator("embedded", "transformers")


@pytest.fixture
def loaded(monkeypatch, embedded):
    """The embedded model without loading it again; what it was asked is in the list."""
    asked = []

    def generate(prompts, seeds, sampling):
        asked.append(seeds)
        return embedded.generate(prompts, seeds, sampling)

    counting = dataclasses.replace(embedded, generate=generate)
    monkeypatch.setattr(module, "load_generator", lambda name, backend: counting)
    return asked


def line(id: str, *verdicts: bool | None, **others) -> dict:
    completion = {"text": "", "tokens": 4, "truncated": False, "extracted": None, "reason": ""} | others
    return {
        "id": id,
        "prompt": "",
        "gold": "1",
        "rule": {},
        "completions": [completion | {"correct": v} for v in verdicts],
    }


# Generation


def test_rows_that_end_early_are_left_out_and_the_others_go_on(embedded, monkeypatch):
    """In spans of 4 tokens or in one, greedy decoding comes to the same text, and to what the model alone says."""
    prompts = encode(embedded.tokenizer, [problem.prompt for problem in sums("gsm8k")])
    sampling = Sampling(0.0, 1.0, 40)
    whole = embedded.generate(prompts, [0] * len(prompts), sampling)
    monkeypatch.setattr("capo_rl.evaluation.generation._FIRST_SPAN", 4)
    assert embedded.generate(prompts, [0] * len(prompts), sampling) == whole
    lengths = {len(completion.ids) for completion in whole}
    assert len(lengths) > 2 and not any(completion.truncated for completion in whole)
    alone = embedded.generate(prompts[3:4], [0], sampling)
    assert alone == whole[3:4]


def test_a_completion_ends_with_its_end_token_or_is_truncated(embedded):
    prompts = encode(embedded.tokenizer, [sums("gsm8k")[-1].prompt] * 20)
    end = embedded.tokenizer.eos_token_id
    for ids, truncated in embedded.generate(prompts, [1] * 20, Sampling(1.0, 1.0, 12)):
        assert len(ids) <= 12 and end not in ids[:-1]
        assert truncated == (ids[-1] != end)
    assert any(c.truncated for c in embedded.generate(prompts, [1] * 20, Sampling(1.0, 1.0, 2)))


def test_sampling_depends_on_seeds_alone(embedded):
    prompts = encode(embedded.tokenizer, [sums("gsm8k")[-1].prompt] * 4)
    sampling = Sampling(1.0, 1.0, 20)
    first = embedded.generate(prompts, [1, 2, 3, 4], sampling)
    torch.manual_seed(99)
    assert embedded.generate(prompts, [1, 2, 3, 4], sampling) == first
    assert embedded.generate(prompts, [1, 2, 3, 5], sampling) != first


def test_top_p_leaves_out_the_tail(embedded):
    prompts = encode(embedded.tokenizer, [sums("gsm8k")[-1].prompt] * 8)
    likeliest = embedded.generate(prompts, [1] * 8, Sampling(1.0, 1e-6, 20))
    assert likeliest == embedded.generate(prompts, [1] * 8, Sampling(0.0, 1.0, 20))


def test_chat_template_is_used_where_there_is_one():
    tokenizer = make_tokenizer()
    assert encode(tokenizer, ["w1 w2"]) == [tokenizer("w1 w2")["input_ids"]]
    tokenizer.chat_template = (
        "{% for m in messages %}w7 {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} w8{% endif %}"
    )
    assert encode(tokenizer, ["w1 w2"]) == [tokenizer("w7 w1 w2 w8")["input_ids"]]


def test_text_without_tokens_is_an_error(embedded):
    with pytest.raises(ModelError, match="can't read"):
        encode(embedded.tokenizer, ["¿2*3?"])


def test_an_adapter_is_merged_into_its_model(tmp_path):
    from peft import LoraConfig, get_peft_model

    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    prompts, sampling = [[5, 9, 17], [6]], Sampling(0.0, 1.0, 12)
    expected = adapted.merge_and_unload().eval()
    for name, differs in (("base", True), ("adapter", False)):
        assert choose_backend(str(tmp_path / name)) == "transformers"
        generator = load_generator(str(tmp_path / name), "transformers")
        ids = expected.generate(torch.tensor(prompts[:1]), max_new_tokens=12, do_sample=False)[0, 3:].tolist()
        assert (generator.generate(prompts, [0, 0], sampling)[0].ids != ids) == differs

    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_generator(str(tmp_path / "adapter"), "transformers")


def test_vllm_is_given_token_ids_and_a_seed_a_request(monkeypatch):
    """Against a stand-in with vLLM's names; keyword arguments it doesn't have are errors here."""
    calls = {}

    @dataclasses.dataclass
    class SamplingParams:
        temperature: float
        top_p: float
        max_tokens: int
        stop_token_ids: list[int]
        seed: int

    class LLM:
        def __init__(self, model, load_format, generation_config, trust_remote_code):
            calls["model"] = (model, load_format, generation_config, trust_remote_code)

        def generate(self, prompts, sampling_params, use_tqdm):
            calls["generate"] = (prompts, sampling_params)
            reasons = ["stop", "length"]
            outputs = [types.SimpleNamespace(token_ids=(4, 1), finish_reason=reason) for reason in reasons]
            return [types.SimpleNamespace(outputs=[output]) for output in outputs]

    stand_in = types.ModuleType("vllm")
    stand_in.__spec__ = types.SimpleNamespace()
    stand_in.LLM, stand_in.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    assert choose_backend("embedded") == "transformers"  # no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_backend("embedded") == "vllm"

    generator = load_generator("embedded", "vllm")
    completions = generator.generate([[5], [6, 7]], [11, 12], Sampling(0.6, 0.95, 2))
    assert completions == [Completion([4, 1], False), Completion([4, 1], True)]
    assert calls["model"][1:] == ("safetensors", "vllm", False)
    prompts, params = calls["generate"]
    assert prompts == [{"prompt_token_ids": [5]}, {"prompt_token_ids": [6, 7]}]
    assert params == [SamplingParams(0.6, 0.95, 2, [1], seed) for seed in (11, 12)]


# Evaluation


def test_every_completion_is_kept_and_graded(tmp_path, loaded):
    evaluation = evaluate(SMALL, ["gsm8k"], tmp_path)
    problems = {problem.id: problem for problem in sums("gsm8k")}
    assert {line["id"] for line in evaluation["gsm8k"]} == set(problems)
    for line in evaluation["gsm8k"]:
        assert line["prompt"] == problems[line["id"]].prompt and len(line["completions"]) == 3
        for answer in line["completions"]:
            box = f"\\boxed{{{answer['extracted']}}}"
            assert answer["text"].endswith(box) or answer["extracted"] is None
            assert answer["correct"] == (answer["extracted"] == line["gold"])
    rights = [answer["correct"] for line in evaluation["gsm8k"] for answer in line["completions"]]
    assert 0 < sum(rights) < 30  # the embedded model solves half
    figures = json.loads((tmp_path / "summary.json").read_text())["benchmarks"]["gsm8k"]
    assert figures["accuracy"] == pytest.approx(sum(rights) / 30)


# A problem's three completions in one batch, or in two; stopped in the first benchmark or in the second.
@pytest.mark.parametrize(("batch_size", "stopped_after"), [(3, 4), (8, 1), (8, 6)])
def test_a_stopped_evaluation_comes_to_the_same(tmp_path, loaded, monkeypatch, batch_size, stopped_after):
    settings = dataclasses.replace(SMALL, batch_size=batch_size)
    whole = evaluate(settings, ["gsm8k", "math500"], tmp_path / "whole")
    batches = len(loaded)

    graded, count = module._graded, iter(range(100))

    def killed(*arguments):
        if next(count) == stopped_after:
            raise Killed
        return graded(*arguments)

    monkeypatch.setattr(module, "_graded", killed)
    with pytest.raises(Killed):
        evaluate(settings, ["gsm8k", "math500"], tmp_path / "stopped")
    monkeypatch.setattr(module, "_graded", graded)
    file = tmp_path / "stopped" / "gsm8k.jsonl"
    lines = file.read_bytes()
    file.write_bytes(lines + b'{"id": "gsm8k/')  # a kill within a line
    del loaded[:]
    resumed = evaluate(settings, ["gsm8k", "math500"], tmp_path / "stopped")
    assert lines and file.read_bytes().startswith(lines)
    assert {name: sorted(lines, key=lambda line: line["id"]) for name, lines in resumed.items()} == {
        name: sorted(lines, key=lambda line: line["id"]) for name, lines in whole.items()
    }
    again = len(loaded) - (batches - stopped_after)
    assert again == 0 if batch_size == 3 else again <= 1  # the batch that had the head of an unfinished problem

    del loaded[:]
    assert evaluate(settings, ["gsm8k", "math500"], tmp_path / "stopped") == resumed
    assert not loaded


def test_another_benchmark_can_be_added_later(tmp_path, loaded):
    evaluate(SMALL, ["math500"], tmp_path)
    batches = len(loaded)
    assert list(evaluate(SMALL, ["gsm8k", "math500"], tmp_path)) == ["gsm8k", "math500"]
    assert len(loaded) == 2 * batches


def test_limit_takes_the_same_problems_for_every_seed(tmp_path, loaded):
    ids = []
    for seed in (0, 1):
        settings = dataclasses.replace(SMALL, limit=4, seed=seed)
        evaluation = evaluate(settings, ["gsm8k"], tmp_path / str(seed))
        ids.append({line["id"] for line in evaluation["gsm8k"]})
    assert len(ids[0]) == 4 and ids[0] == ids[1] != {f"gsm8k/{i}" for i in range(4)}


def test_temperature_zero_is_one_greedy_completion(tmp_path, loaded):
    settings = Settings("embedded", temperature=0.0, max_new_tokens=60)
    first, second = (
        evaluate(dataclasses.replace(settings, seed=seed), ["aime24"], tmp_path / str(seed)) for seed in (0, 1)
    )
    assert first == second
    assert summarize(first)["benchmarks"]["aime24"]["samples"] == 1


def test_a_secret_benchmark_leaves_no_text(tmp_path, loaded):
    evaluation = evaluate(SMALL, ["gpqa_diamond"], tmp_path)
    for line in evaluation["gpqa_diamond"]:
        assert line.keys() == {"id", "completions"}
        for answer in line["completions"]:
            assert answer.keys() == {"tokens", "truncated", "correct", "reason", "extracted"}
            assert answer["extracted"] in {None, "A", "B", "C", "D"}
    text = "".join(file.read_text() for file in tmp_path.iterdir())
    assert "Compute" not in text and "boxed" not in text
    assert any(answer["correct"] for line in evaluation["gpqa_diamond"] for answer in line["completions"])
    before = (tmp_path / "gpqa_diamond.jsonl").read_bytes()
    assert regrade(tmp_path).secret == ("gpqa_diamond",)
    assert (tmp_path / "gpqa_diamond.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("extracted", "kept"),
    [("B", "B"), (r"\text{(C)}", "C"), ("What is the question?", None), ("ABLE", None), (None, None)],
)
def test_only_a_letter_of_a_secret_answer_is_kept(extracted, kept):
    answer = {"text": "...", "tokens": 1, "truncated": False, "correct": False, "reason": "", "extracted": extracted}
    assert module._without_text(answer) == {
        "tokens": 1,
        "truncated": False,
        "correct": False,
        "reason": "",
        "extracted": kept,
    }


def test_hostile_text_comes_back_as_it_was(tmp_path):
    text = "\x1b[2J\u2028\ud800\r\n\x00\\boxed{1}"
    (tmp_path / "evaluation.json").write_text('{"settings": {}}')
    written = encoded(line("a", True, text=text))
    assert written.count(b"\n") == 1 and written.isascii() and b"\x1b" not in written
    (tmp_path / "gsm8k.jsonl").write_bytes(written)
    assert read_evaluation(tmp_path)["gsm8k"][0]["completions"][0]["text"] == text
    assert regrade(tmp_path).changed == 0


def test_regrade_says_what_changed(tmp_path, loaded, capsys):
    evaluation = evaluate(SMALL, ["gsm8k"], tmp_path)
    before = (tmp_path / "gsm8k.jsonl").read_bytes()
    assert dataclasses.astuple(regrade(tmp_path)) == (30, 0, 0, 0, (), ())
    assert (tmp_path / "gsm8k.jsonl").read_bytes() == before

    answers = [answer for line in evaluation["gsm8k"] for answer in line["completions"]]
    right, wrong = (next(answer for answer in answers if answer["correct"] is verdict) for verdict in (True, False))
    right["correct"], wrong["correct"] = None, True
    right["reason"] = "timed out"
    (tmp_path / "gsm8k.jsonl").write_bytes(b"".join(map(encoded, evaluation["gsm8k"])))
    assert main(["regrade", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "2 of 30 verdicts changed (1 to right, 1 from right)" in shown
    assert (
        ": no verdict (timed out), now right (the same " in shown and ": right (" in shown and ", now wrong (" in shown
    )
    assert (tmp_path / "gsm8k.jsonl").read_bytes() == before


# Figures


def test_summary_counts_what_it_says():
    lines = [
        line("a", True, True, False, False),
        line("b", False, False, False, None, truncated=True),
        line("c", True, True, True, True, tokens=10),
    ]
    lines[1]["completions"][3]["reason"] = "timed out"
    row = summarize({"gsm8k": lines})["benchmarks"]["gsm8k"]
    assert row["accuracy"] == row["pass@k"]["1"] == 0.5
    assert row["pass@k"]["2"] == pytest.approx((5 / 6 + 0 + 1) / 3)  # of C(4, 2) = 6 pairs, one has neither right
    assert row["pass@k"]["4"] == pytest.approx(2 / 3)
    assert (row["problems"], row["samples"], row["tokens"]) == (3, 4, 6.0)
    assert (row["truncated"], row["timed_out"], row["ungraded"]) == (4, 1, 1)
    assert row["low"] < 0.5 < row["high"]


def test_mean_weighs_benchmarks_alike():
    evaluation = {"gsm8k": [line(str(i), True) for i in range(8)], "aime24": [line("0", False), line("1", False)]}
    mean = summarize(evaluation)["mean"]
    assert mean["accuracy"] == 0.5 and not mean["test"]
    assert 0 < mean["low"] < 0.5 < mean["high"] < 1  # though all problems of each agree


def test_interval_of_the_mean_covers_what_it_says():
    """Of three benchmarks with known shares; that of one is its own."""
    rng = np.random.default_rng(0)
    shares = {"gsm8k": (0.9, 100), "math500": (0.5, 60), "aime24": (0.05, 30)}
    covered = 0
    for _ in range(400):
        draws = {name: [line(str(i), bool(rng.random() < p)) for i in range(n)] for name, (p, n) in shares.items()}
        mean = summarize(draws)["mean"]
        covered += mean["low"] <= np.mean([p for p, _ in shares.values()]) <= mean["high"]
    assert 0.92 < covered / 400 < 0.98
    summary = summarize({"gsm8k": draws["gsm8k"]})
    assert summary["mean"]["low"] == pytest.approx(summary["benchmarks"]["gsm8k"]["low"])


def test_only_all_of_the_eight_make_test():
    evaluation = {name: [line(str(i), True) for i in range(10)] for name in BENCHMARKS}
    assert summarize(evaluation)["mean"]["test"]
    assert not summarize(evaluation | {"aime25": evaluation["aime25"][:9]})["mean"]["test"]
    del evaluation["gpqa_diamond"]
    assert not summarize(evaluation)["mean"]["test"]


def test_differences_are_over_the_problems_of_both():
    ours = {"gsm8k": [line(str(i), True, i % 2 == 0) for i in range(20)], "aime24": [line("x", True)]}
    theirs = {"gsm8k": [line(str(i), i % 4 == 0, False) for i in range(4, 24)], "aime25": [line("x", True)]}
    (difference,) = compare(ours, theirs)
    assert (difference.name, difference.problems, difference.apart) == ("gsm8k", 16, 8)
    assert difference.difference == pytest.approx(0.75 - 0.125)
    assert difference.low < difference.difference < difference.high and difference.above == 1.0
    same = compare(ours, ours)
    assert [d.name for d in same] == ["gsm8k", "aime24", "mean"]
    assert (same[0].difference, same[0].low, same[0].high, same[0].above) == (0.0, 0.0, 0.0, 0.5)
    with pytest.raises(EvaluationError, match="in common"):
        compare(ours, {"math500": [line("a", True)]})


# Errors and the command


@pytest.mark.parametrize(
    "settings",
    [
        {"samples": 0},
        {"limit": 0},
        {"max_new_tokens": 0},
        {"batch_size": -1},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"temperature": 0.0, "samples": 4},
    ],
)
def test_settings_that_mean_nothing_are_errors(settings):
    with pytest.raises(EvaluationError, match=next(iter(settings))):
        Settings("embedded", **settings)


def test_a_folder_of_something_else_is_an_error(tmp_path, loaded):
    evaluate(SMALL, ["gsm8k"], tmp_path / "there")
    with pytest.raises(EvaluationError, match=r"other settings \(seed, top_p\)"):
        evaluate(dataclasses.replace(SMALL, seed=1, top_p=0.9), ["gsm8k"], tmp_path / "there")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    with pytest.raises(EvaluationError, match="not the folder of an evaluation"):
        evaluate(SMALL, ["gsm8k"], tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["notes"]


def test_a_benchmark_that_changed_is_an_error(tmp_path, loaded, monkeypatch):
    evaluate(SMALL, ["gsm8k"], tmp_path)
    changed = [dataclasses.replace(problem, prompt=problem.prompt + " ") for problem in sums("gsm8k")]
    monkeypatch.setattr(module, "load_benchmark", lambda name, folder=None: changed)
    with pytest.raises(EvaluationError, match="another problem"):
        evaluate(SMALL, ["gsm8k"], tmp_path)


def test_two_can_not_write_to_one_folder(tmp_path, loaded):
    evaluate(SMALL, ["gsm8k"], tmp_path)
    with sole_writer(tmp_path):
        for writes in (lambda: evaluate(SMALL, ["math500"], tmp_path), lambda: regrade(tmp_path)):
            with pytest.raises(RunFolderError, match=r"process \d+ on .* is writing to it; wait for that one"):
                writes()
    assert regrade(tmp_path).completions == 30


def test_a_lock_that_was_left_is_no_evaluation(tmp_path, loaded):
    (tmp_path / LOCK).write_text("process 1 on another\n")
    assert len(evaluate(SMALL, ["gsm8k"], tmp_path)["gsm8k"]) == 10


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EvaluationError, match="file: is a file; give another --out"):
        evaluate(SMALL, ["gsm8k"], tmp_path / "file")
    with pytest.raises(RunFolderError, match="can't be written to"):
        evaluate(SMALL, ["gsm8k"], tmp_path / "file" / "below")


def test_a_log_has_a_line_for_each_tenth(tmp_path, loaded, capsys):
    evaluate(SMALL, ["gsm8k"], tmp_path)
    shown = capsys.readouterr().err
    assert "\r" not in shown and "it/s" not in shown
    lines = shown.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"gsm8k: completion {done} of 30" for done in (8, 16, 24, 30)]
    assert all(", right " in line for line in lines)


def test_rules_of_another_version_are_an_error(tmp_path):
    (tmp_path / "evaluation.json").write_text('{"settings": {}}')
    (tmp_path / "gsm8k.jsonl").write_bytes(encoded(line("a", True) | {"rule": {"colour": "red"}}))
    with pytest.raises(EvaluationError, match="another version"):
        regrade(tmp_path)


def test_a_broken_line_is_named(tmp_path, loaded):
    evaluate(SMALL, ["gsm8k"], tmp_path)
    file = tmp_path / "gsm8k.jsonl"
    file.write_bytes(b'{"id": 3}\n' + file.read_bytes())
    with pytest.raises(EvaluationError, match="line 1"):
        read_evaluation(tmp_path)


def test_a_completion_longer_than_the_model_reads_is_an_error(tmp_path, loaded):
    with pytest.raises(EvaluationError, match="the model reads 256"):
        evaluate(dataclasses.replace(SMALL, max_new_tokens=256), ["gsm8k"], tmp_path)
    evaluate(SMALL, ["gsm8k"], tmp_path)  # the mended command may use the same folder


def test_command(tmp_path, loaded, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    arguments = ["--samples", "2", "--temperature", "1", "--max-new-tokens", "60"]
    eight = ["eval", "embedded", *arguments, "--out", str(tmp_path / "all")]
    assert main(eight) == 0
    shown = capsys.readouterr().out
    assert "TEST" in shown and "aime25" in shown and "\x1b" not in shown
    one = ["eval", "embedded", *arguments, "--seed", "1", "--out", str(tmp_path / "one"), "--benchmarks", "gsm8k"]
    assert main([*one, "--baseline", str(tmp_path / "all")]) == 0
    shown = capsys.readouterr().out
    assert "mean of those run" in shown and "P(above 0)" in shown and "differ in: seed" in shown
    assert "math500: 10 problems, in one of the two only" in shown and "gsm8k: 10" not in shown
    assert main(["regrade", str(tmp_path / "all")]) == 0
    shown = capsys.readouterr().out
    assert "0 of 140 verdicts changed" in shown and "gpqa_diamond: not graded again" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "embedded", "--samples", "0"],
        ["eval", "embedded", "--baseline", "nowhere"],
        ["eval", "./no-such-model"],
        ["regrade", "nowhere"],
    ],
)
def test_mendable_errors_are_one_line(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("capo: error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
