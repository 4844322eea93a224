"""Loading problems: what is wrong with a file, where, and what to do about it."""

import inspect
import json
import os
import re
from pathlib import Path

import datasets
import pytest
from trl import GRPOTrainer

from capo_rl.rewards.grading import Grader
from capo_rl.runs.data import RESERVED, DataError, as_prompts, drop_long_prompts, drop_ungradable, load_problems
from conftest import ROOT

DATA = Path(os.environ.get("CAPO_DATA", ROOT / ".." / "shared" / "data"))
GOOD = {"problem": "1+1?", "answer": "2"}


def write(tmp_path, *rows, name="train.jsonl"):
    """A file of these rows: bytes and text as they are, anything else as JSON."""
    lines = [
        row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()
        for row in rows
    ]
    path = tmp_path / name
    path.write_bytes(b"\n".join(lines))
    return str(path)


def test_reads_json_lines_cut_at_newlines_only(tmp_path):
    odd = {"problem": "a\u2028b\u0085c\x0bd", "answer": "2", "level": None}
    text = json.dumps(odd, ensure_ascii=False)
    dataset = load_problems(write(tmp_path, GOOD | {"level": "1"}, text, "", ""))
    assert dataset["problem"] == ["1+1?", odd["problem"]]
    assert dataset["answer"] == ["2", "2"]
    assert load_problems(write(tmp_path, text + "\r", text + "\r", name="windows.txt")).num_rows == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [GOOD, '{"problem": "1+1?"'],
            r"train.jsonl, line 2: not JSON \(.*\); write one whole JSON object a line",
        ),
        ([GOOD, "", GOOD], "line 2: not JSON"),
        ([GOOD, "[" * 100_000], "line 2: not JSON"),
        ([GOOD, GOOD, [1]], "line 3: a JSON list; write an object with `problem`, `answer`"),
        ([GOOD, b'{"problem": "\xff"}'], "line 2: not UTF-8 at byte 13; save the file as UTF-8"),
        (
            [GOOD, {"problem": "?", "gold": "2"}],
            "line 2: no field `answer`; its fields are `problem`, `gold`",
        ),
        (
            [{"question": "?", "answer": "2"}],
            "line 1: no field `problem`; its fields are `question`, `answer`",
        ),
        ([{}], "line 1: no field `problem`; its fields are none"),
        ([GOOD, GOOD | {"answer": 2}], "line 2: `answer` is 2; write it as text, in quotes"),
        ([GOOD | {"answer": None}], "line 1: `answer` is None; write it as text"),
        ([GOOD | {"answer": " "}], "line 1: `answer` is empty; fill it in or leave the line out"),
        ([GOOD | {"problem": ""}], "line 1: `problem` is empty"),
        ([], "train.jsonl: the file is empty; it needs one JSON object a line"),
        (["", "  ", ""], "train.jsonl: the file is empty"),
        ([GOOD | {"level": 1}, GOOD | {"level": "one"}], "train.jsonl: a column changes its type"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_the_fix(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load_problems(write(tmp_path, *rows))


def test_a_missing_file_names_its_nearest_neighbour(tmp_path):
    write(tmp_path, GOOD, name="math_train.jsonl")
    with pytest.raises(DataError, match=r"math_trian.jsonl: no such file; did you mean math_train.jsonl\?"):
        load_problems(str(tmp_path / "math_trian.jsonl"))
    with pytest.raises(DataError, match=r"no such file$"):
        load_problems(str(tmp_path / "nowhere" / "x.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=r"folder\.jsonl: Is a directory; give a JSON Lines file"):
        load_problems(str(tmp_path / "folder.jsonl"))


def test_a_limit_draws_a_sample_that_the_seed_decides(tmp_path):
    name = write(tmp_path, *({"problem": f"{i}?", "answer": str(i)} for i in range(50)))
    first, again, other = (load_problems(name, limit=10, seed=seed)["answer"] for seed in (1, 1, 2))
    assert list(first) == list(again) != list(other)
    assert len(set(first)) == 10 and list(first) != [str(i) for i in range(10)]
    assert load_problems(name, limit=100).num_rows == load_problems(name).num_rows == 50
    with pytest.raises(DataError, match="limit=0: ask for at least one"):
        load_problems(name, limit=0)


def test_arithmetic_is_made_up_here():
    pytest.importorskip("capo_rl.tasks.arithmetic", reason="capo_rl.tasks.arithmetic is not written yet")
    dataset = load_problems("arithmetic", limit=20, seed=3)
    assert dataset.num_rows == 20 and {"problem", "answer"} <= set(dataset.column_names)
    assert dataset.to_list() == load_problems("arithmetic", limit=20, seed=3).to_list()
    longer = load_problems("arithmetic", config="8", limit=1, seed=3)["problem"][0]
    assert len(re.findall(r"[+-]", longer)) == 7
    for terms in ("1", "many"):
        with pytest.raises(DataError, match=f"dataset_config='{terms}'.*number of terms"):
            load_problems("arithmetic", config=terms)


def test_a_hub_that_does_not_answer_is_explained(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"org/maths: .* failed \(ConnectionError: no route\); check the spelling"):
        load_problems("org/maths")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": ["?"], "answer": ["2"]}, "no column `problem`; its columns are `question`, `answer`"),
        ({"problem": ["?", "?"], "answer": ["2", ""]}, "org/maths, row 1: `answer` is empty"),
        ({"problem": ["?"], "answer": [2]}, "row 0: `answer` is 2"),
        ({"problem": [], "answer": []}, "split test is empty"),
    ],
)
def test_a_hub_dataset_is_checked_too(monkeypatch, columns, message):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_dict(columns))
    with pytest.raises(DataError, match=message):
        load_problems("org/maths", split="test")


def test_a_hub_dataset_gets_its_config_and_split(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_problems("org/maths", config="algebra", split="test").to_list() == [GOOD]
    assert asked == [(("org/maths", "algebra"), {"split": "test"})]  # and no trust_remote_code


@pytest.mark.skipif(not (DATA / "math_train.jsonl").exists(), reason="no shared data: set CAPO_DATA")
def test_reads_math():
    dataset = load_problems(str(DATA / "math_train.jsonl"))
    assert dataset.num_rows == 7500 and {"problem", "answer"} <= set(dataset.column_names)


# --- from problems to prompts


@pytest.fixture
def problems():
    rows = [{"problem": f"{'x ' * n}?", "answer": "2", "solution": "s", "id": str(n)} for n in (1, 5, 9)]
    return datasets.Dataset.from_list(rows)


def test_conversational_prompts(problems):
    dataset = as_prompts(problems, conversational=True, system_prompt="Be brief.", suffix="\nGo.")
    assert dataset[0]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "x ?\nGo."},
    ]
    assert "solution" not in dataset.column_names and dataset["answer"] == problems["answer"]
    assert as_prompts(dataset, conversational=True)[0]["prompt"] == [{"role": "user", "content": "x ?"}]


def test_plain_prompts(problems):
    assert as_prompts(problems, conversational=False)["prompt"] == problems["problem"]
    assert as_prompts(problems, conversational=False, system_prompt="Be.")[0]["prompt"] == "Be.\n\nx ?"


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids", "image", "images", "log_metric"])
def test_columns_by_a_name_that_trl_reserves_are_left_out(problems, caplog, name):
    dataset = as_prompts(problems.add_column(name, [None] * len(problems)), conversational=False)
    assert set(dataset.column_names) == {"problem", "answer", "id", "prompt"}
    assert f"the data's columns `{name}` are left out" in caplog.text


def test_every_name_that_trl_adds_to_the_data_is_reserved():
    """A new version of TRL may pass more to reward functions, or read more of the data."""
    source = inspect.getsource(GRPOTrainer)
    passed = set(re.findall(r'reward_kwargs\["(\w+)"\]', source))
    read = set(re.findall(r'"(\w+)" in inputs\[0\]', source))
    assert {"log_extra", "log_metric"} <= passed and {"image", "images"} <= read
    assert passed | read <= set(RESERVED)


class Words:
    """A tokenizer as far as counting goes: one token a word, and three for the chat template."""

    def __call__(self, text):
        return {"input_ids": [prompt.split() for prompt in text]}

    def apply_chat_template(self, conversation, add_generation_prompt, tokenize, return_dict):
        assert add_generation_prompt and tokenize and return_dict
        return self([f"<user> {prompt[0]['content']} </user> <assistant>" for prompt in conversation])


@pytest.mark.parametrize(("conversational", "lengths"), [(False, (2, 6, 10)), (True, (5, 9, 13))])
def test_long_prompts_are_left_out_and_counted(problems, conversational, lengths):
    dataset = as_prompts(problems, conversational=conversational)
    for n, length in enumerate(lengths):
        for limit, kept in ((length, n + 1), (length - 1, n)):
            short, dropped = drop_long_prompts(dataset, Words(), limit)
            assert (list(short["id"]), dropped) == (["1", "5", "9"][:kept], 3 - kept)
    assert drop_long_prompts(dataset.select([]), Words(), 5)[1] == 0


def test_text_the_tokenizer_cannot_read_is_explained(problems):
    class Narrow(Words):
        def __call__(self, text):
            raise Exception("WordLevel error: Missing [UNK] token")

    with pytest.raises(DataError, match=r"tokenizer can't read these prompts \(Exception: WordLevel error"):
        drop_long_prompts(as_prompts(problems, conversational=False), Narrow(), 5)


def test_ungradable_problems_are_left_out_and_counted():
    answers = ["2", r"\frac12", "x^", "3"]
    dataset = datasets.Dataset.from_dict({"problem": list("abcd"), "answer": answers})
    with Grader(workers=1) as grader:
        kept, dropped = drop_ungradable(dataset, grader)
        assert (list(kept["problem"]), dropped) == (["a", "b", "d"], 1)
        assert drop_ungradable(kept, grader)[1] == 0
