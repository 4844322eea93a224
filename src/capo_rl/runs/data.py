"""Problems to train on: made up here, from JSON Lines, or from the Hugging Face hub."""

from __future__ import annotations

import difflib
import json
import logging
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capo_rl.rewards.constraints import ConstraintError, check_constraints

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from capo_rl.rewards.grading import Grader

COLUMNS = ("problem", "answer")  # a row may have `constraints` in place of an `answer`
# Columns that TRL reads (images), keeps from reward functions, or passes something of its own by the name of.
RESERVED = (
    *("prompt", "prompts", "completion", "completions", "completion_ids", "image", "images"),
    *("environments", "trainer_state", "log_extra", "log_metric"),
)

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """Training data that can't be used; the message names the place and the fix."""


def load_problems(
    name: str, *, config: str | None = None, split: str = "train", limit: int | None = None, seed: int = 0
) -> datasets.Dataset:
    """A dataset with the columns `problem` and `answer`, or `constraints` in its place, at most `limit` rows of it,
    drawn with `seed`.

    `name` is `arithmetic` or `sentences` (as many made-up problems as `limit` says, 4096 if it doesn't; of `arithmetic`
    `config` is their number of terms), a JSON Lines file, or the id of a dataset on the hub, of which `config` and
    `split` are taken.

    Raises `DataError` for a file or dataset that is missing, empty, malformed, or lacks a column.

    >>> load_problems("trian.jsonl")
    Traceback (most recent call last):
        ...
    capo_rl.runs.data.DataError: trian.jsonl: no such file
    """
    import datasets

    check_there(name)
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: ask for at least one problem, or leave it out for all of them")
    if name == "arithmetic":
        from capo_rl.tasks.arithmetic import problems

        if config is not None and not (config.isdecimal() and int(config) >= 2):
            raise DataError(f"dataset_config={config!r}: of `arithmetic` it is the number of terms, at least 2")
        return datasets.Dataset.from_list(list(islice(problems(seed, int(config or 5)), limit or 4096)))
    if name == "sentences":
        from capo_rl.tasks.sentences import sentences

        if config is not None:
            raise DataError(f"dataset_config={config!r}: `sentences` has none; leave it out")
        return datasets.Dataset.from_list(list(islice(sentences(seed), limit or 4096)))
    path = Path(name).expanduser()
    dataset = _read(path) if path.suffix == ".jsonl" or path.is_file() else _download(name, config, split)
    if limit is not None and limit < len(dataset):
        # A sample, not the head: MATH is sorted by subject.
        dataset = dataset.shuffle(seed=seed).select(range(limit))
    return dataset


def check_there(name: str) -> None:
    """Raises `DataError` for a JSON Lines file that is not there; known before the libraries load that read it."""
    path = Path(name).expanduser()
    if path.suffix == ".jsonl" and not path.exists():
        names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        raise DataError(f"{path}: no such file" + (f"; did you mean {near[0]}?" if near else ""))


def _read(path: Path) -> datasets.Dataset:
    import datasets

    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give a JSON Lines file") from None
    # Lines end at "\n" only: `splitlines` would also cut at U+2028, which JSON allows inside a string.
    lines = content.rstrip().split(b"\n") if content.strip() else []
    rows = [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    if not rows:
        raise DataError(f"{path}: the file is empty; it needs one JSON object a line, with {_listed(COLUMNS)}")
    if mixed := [number for number, row in enumerate(rows, start=1) if ("answer" in row) != ("answer" in rows[0])]:
        raise DataError(f"{path}, line {mixed[0]}: here an `answer` and there `constraints`; give all lines the same")
    try:
        return datasets.Dataset.from_list(rows)
    except Exception as error:  # pyarrow's own classes: a column of numbers here and text there
        raise DataError(f"{path}: a column changes its type ({_first_line(error)}); make each one type") from error


def _row(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}); write one whole JSON object a line") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: a JSON {type(row).__name__}; write an object with {_listed(COLUMNS)}")
    for column in _columns(row):
        if column not in row:
            raise DataError(f"{place}: no field `{column}`; its fields are {_listed(row)}")
        _check(row[column], column, place)
    return row


def _columns(there: Any) -> tuple[str, ...]:
    """What a row needs: constraints only where it has no answer."""
    return ("problem", "constraints") if "constraints" in there and "answer" not in there else COLUMNS


def _download(name: str, config: str | None, split: str) -> datasets.Dataset:
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # hub, network, cache and parsing errors have no class in common
        raise DataError(
            f"{name}: no such file, and loading it from the hub failed ({_first_line(error)}); check the spelling, "
            "the config, the split and the network, or give `arithmetic` or the path of a .jsonl file"
        ) from error
    columns = _columns(dataset.column_names)
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise DataError(
            f"{name}: no column {_listed(missing)}; its columns are {_listed(dataset.column_names)}: "
            "save it as JSON Lines with these two renamed"
        )
    if not len(dataset):
        raise DataError(f"{name}: split {split} is empty; choose another")
    for column in columns:
        for number, value in enumerate(dataset[column]):
            _check(value, column, f"{name}, row {number}")
    return dataset


def _check(value: Any, column: str, place: str) -> None:
    if column == "constraints":
        try:
            check_constraints(value)
        except ConstraintError as error:
            raise DataError(f"{place}: {error}") from None
        return
    if not isinstance(value, str):
        raise DataError(f"{place}: `{column}` is {value!r:.60}; write it as text, in quotes")
    if not value.strip():
        raise DataError(f"{place}: `{column}` is empty; fill it in or leave the line out")


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def drop_ungradable(dataset: datasets.Dataset, grader: Grader) -> tuple[datasets.Dataset, int]:
    """The dataset without the problems whose gold answer can't be graded, and how many those were."""
    bad = grader.ungradable(dataset["answer"], progress=True)
    return _without(dataset, bad)


def as_prompts(
    dataset: datasets.Dataset, *, conversational: bool, system_prompt: str | None = None, suffix: str = ""
) -> datasets.Dataset:
    r"""The dataset with a `prompt` column for TRL, and without `solution`, which no reward may see.

    Columns by a name that TRL reserves are left out, with a warning.
    `suffix` follows each problem, say `"\nPut the answer in \\boxed{}."`; a plain prompt starts with the
    system prompt and an empty line.

    >>> import datasets
    >>> row = datasets.Dataset.from_list([{"problem": "1+1?", "answer": "2"}])
    >>> as_prompts(row, conversational=False, system_prompt="Be brief.", suffix=" Why?")[0]["prompt"]
    'Be brief.\n\n1+1? Why?'
    """

    def prompt(problem: str) -> str | list[dict[str, str]]:
        if not conversational:
            return (f"{system_prompt}\n\n" if system_prompt else "") + problem + suffix
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return [*system, {"role": "user", "content": problem + suffix}]

    if reserved := [column for column in dataset.column_names if column in RESERVED and column != "prompt"]:
        logger.warning("the data's columns %s are left out: TRL uses these names itself", _listed(reserved))
    unwanted = {"prompt", "solution", *reserved}
    dataset = dataset.remove_columns([column for column in dataset.column_names if column in unwanted])
    return dataset.add_column("prompt", [prompt(problem) for problem in dataset["problem"]])


def drop_long_prompts(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int
) -> tuple[datasets.Dataset, int]:
    """The dataset without the prompts of more than `max_prompt_length` tokens, and how many those were.

    Prompts are counted as TRL tokenizes them, chat template included. (TRL 1.16 itself never shortens one.)

    Raises `DataError` for text that the tokenizer has no tokens for.
    """
    prompts = list(dataset["prompt"])
    try:
        if prompts and isinstance(prompts[0], str):
            tokens = tokenizer(text=prompts)["input_ids"]
        elif prompts:
            tokens = tokenizer.apply_chat_template(
                conversation=prompts, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        else:
            tokens = []
    except Exception as error:  # a tokenizer without a token for the unknown raises a bare Exception
        raise DataError(
            f"the model's tokenizer can't read these prompts ({_first_line(error)}); "
            "the embedded model knows `arithmetic` only: choose another model for other problems"
        ) from error
    return _without(dataset, {row for row, ids in enumerate(tokens) if len(ids) > max_prompt_length})


def _without(dataset: datasets.Dataset, rows: set[int]) -> tuple[datasets.Dataset, int]:
    kept = dataset.select([row for row in range(len(dataset)) if row not in rows]) if rows else dataset
    return kept, len(rows)
