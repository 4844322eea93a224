"""Constraints as a reward: what they say of a text, whatever the text is, and what is wrong with a constraint."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capo_rl.rewards.constraints import (
    CONSTRAINTS,
    ConstraintError,
    broken,
    check_constraints,
    constraint_reward,
    words,
)
from capo_rl.runs.data import DataError, load_problems
from capo_rl.tasks.sentences import HELD_OUT_NOUNS, NOUNS, sentences


@pytest.mark.parametrize(
    ("text", "constraints", "breaks"),
    [
        ("The river is wide.", {"contains": ["river"]}, []),
        ("The RIVER's wide.", {"contains": ["river"]}, ["contains"]),  # another word
        ('"River!"', {"contains": ["River"]}, []),
        ("riverbank", {"contains": ["river"]}, ["contains"]),
        ("The river and the engine.", {"contains": ["river", "engine"], "lacks": ["and"]}, ["lacks"]),
        ("river", {"contains": ["river", "engine"]}, ["contains"]),
        ("When it rains, we stay.", {"first_word": "when", "last_word": "stay"}, []),
        ("We stay when it rains.", {"first_word": "when", "last_word": "stay"}, ["first_word", "last_word"]),
        ("Is it? ", {"ends_with": "?"}, []),
        ("Is it?!", {"ends_with": "?"}, ["ends_with"]),
        ("one two three", {"least_words": 3, "most_words": 3}, []),
        ("one – two", {"least_words": 3}, ["least_words"]),  # a dash is no word
        ("one two three", {"most_words": 2, "least_words": 4}, ["most_words", "least_words"]),
        ("all lower", {"lower_case": True}, []),
        ("Not all", {"lower_case": True}, ["lower_case"]),
        ("all lower", {"lower_case": False}, ["lower_case"]),
        ("", {"lacks": ["and"], "most_words": 5, "lower_case": True}, ["lacks", "most_words", "lower_case"]),
        (" \n", {"most_words": 5}, ["most_words"]),
        ("a", {"most_words": 5, "contains": None}, []),
    ],
)
def test_what_a_text_breaks(text, constraints, breaks):
    assert broken(text, constraints) == breaks


@given(st.text())
def test_every_text_has_a_verdict(text):
    asked = {"contains": ["a"], "lacks": ["b"], "first_word": "a", "last_word": "b", "ends_with": "."}
    asked |= {"lower_case": True, "least_words": 2, "most_words": 9}
    assert asked.keys() == CONSTRAINTS.keys()
    assert set(broken(text, asked)) <= asked.keys()
    assert all(word == word.lower() and not word.isspace() for word in words(text))


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"contain": ["river"]}, "there is no constraint 'contain'; did you mean 'contains'?"),
        ({"xyz": 1}, "there is no constraint 'xyz'; there are contains, lacks"),
        ({"contains": "river"}, "contains='river': needs a value of type list"),
        ({"contains": []}, r"contains=\[\]: an empty text or none"),
        ({"contains": ["river", 3]}, "an empty text or none; leave it out, or write words in quotes"),
        ({"ends_with": " "}, "ends_with=' ': an empty text"),
        ({"most_words": "5"}, "most_words='5': needs a value of type int"),
        ({"most_words": True}, "most_words=True: needs a value of type int"),
        ({"lower_case": 1}, "lower_case=1: needs a value of type bool"),
        ({}, "every text satisfies it; name at least one"),
        ({"contains": None}, "every text satisfies it; name at least one"),
        (["river"], "write an object"),
    ],
)
def test_a_constraint_that_cant_be_checked_is_named(tmp_path, constraints, message):
    with pytest.raises(ConstraintError, match=message):
        check_constraints(constraints)
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"problem": "?", "constraints": constraints}))
    with pytest.raises(DataError, match=f"train.jsonl, line 1: .*{message}"):
        load_problems(str(path))


def test_the_reward_logs_what_is_broken():
    logged = {}
    completions = ["A river", [{"role": "assistant", "content": "A river."}], [], "A lake."]
    asked = {"contains": ["river"], "ends_with": ".", "most_words": None}
    assert constraint_reward(completions, [asked] * 4, log_metric=logged.__setitem__) == [0.0, 1.0, 0.0, 0.0]
    assert logged == {"constraints/broken/contains": 0.5, "constraints/broken/ends_with": 0.5}


def test_lines_have_all_an_answer_or_all_constraints(tmp_path):
    rows = [{"problem": "?", "constraints": {"contains": ["a"]}}, {"problem": "?", "answer": "2"}]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="line 2: here an `answer` and there `constraints`"):
        load_problems(str(path))
    different = [{"contains": ["a"]}, {"most_words": 3}]
    path.write_text("\n".join(json.dumps({"problem": "?", "constraints": each}) for each in different))
    for asked, loaded in zip(different, load_problems(str(path))["constraints"], strict=True):
        assert {name: value for name, value in loaded.items() if value is not None} == asked


def test_sentences_are_the_same_for_a_seed_and_held_out_words_apart():
    rows = load_problems("sentences", limit=200, seed=3)
    made = sentences(3)
    assert [row["problem"] for row in rows] == [next(made)["problem"] for _ in range(200)]
    assert {len(row["constraints"]["contains"]) for row in rows} == {1, 2, 3}
    assert not set(NOUNS) & set(HELD_OUT_NOUNS)
    held_out = sentences(3, held_out=True)
    assert set(next(held_out)["constraints"]["contains"]) <= set(HELD_OUT_NOUNS)
    with pytest.raises(DataError, match="`sentences` has none"):
        load_problems("sentences", config="5")
