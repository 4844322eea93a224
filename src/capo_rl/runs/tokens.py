"""What selection made of each token of a step, kept in a file: `RUN/tokens/step-000123.safetensors`.

Written by the trainer every `capo_tokens_every` steps, read by `capo explain`. A file holds the tokens of the main
process: with several processes, its share of the batch.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from capo_rl.runs.records import written_whole

if TYPE_CHECKING:
    from torch import Tensor

    from capo_rl.planning.planner import Planner

FOLDER = "tokens"
_NAME = re.compile(r"step-(\d+)\.safetensors")
_PADDING = -1


@dataclass(frozen=True)
class StepTokens:
    """The N tokens of an optimizer step, in C completions.

    completion [N]      which completion the token is of, in [0, C)
    token [N]           its id
    advantage [N]       A, as the loss weighs it by who sampled (vLLM's correction)
    m_h, m_f [N]        the predicted shifts, in units of the objective and in nats
    log_pi [N]          log π(a), in nats
    missing_mass [N]    probability outside the support
    keep [N]            the verdict
    prompt [C, P]       the ids of each completion's prompt, padded on the left with −1
    reward [C]          NaN where there was none
    about               step, mode, judged (what each token was judged by), temperature, and the bounds fisher, low and
                        high, None where a side is open
    """

    completion: NDArray[np.integer]
    token: NDArray[np.integer]
    advantage: NDArray[np.floating]
    m_h: NDArray[np.floating]
    m_f: NDArray[np.floating]
    log_pi: NDArray[np.floating]
    missing_mass: NDArray[np.floating]
    keep: NDArray[np.bool_]
    prompt: NDArray[np.integer]
    reward: NDArray[np.floating]
    about: Mapping[str, Any]

    def broken(self) -> dict[str, NDArray[np.bool_]]:
        """By bound, which tokens break it [N], as `selection.select` compares them.

        A shift that is not finite breaks a bound of its own, and no other.
        """
        finite = np.isfinite(self.m_f) & np.isfinite(self.m_h)
        sides = (
            ("m_F > {:g}", self.about["fisher"], lambda bound: self.m_f > bound),
            ("m_H < {:g}", self.about["low"], lambda bound: self.m_h < bound),
            ("m_H > {:g}", self.about["high"], lambda bound: self.m_h > bound),
        )
        bounds = {name.format(bound): finite & out(bound) for name, bound, out in sides if bound is not None}
        return bounds | {"not finite": ~finite}


@dataclass(frozen=True)
class Rejections:
    """How often a token id was rejected, of how often it was seen, with advantages of one sign."""

    token: int
    rejected: int
    seen: int


def step_tokens(
    step: int,
    planner: Planner,
    rollouts: Sequence[tuple[Mapping[str, Tensor], Tensor]],
    *,
    mode: str,
    granularity: str,
) -> StepTokens:
    """The tokens of the step that `planner` holds; `rollouts` are the inputs and the token mask of each micro-batch."""
    batches = planner.micro_batches
    masks = [_numpy(mask) for _, mask in rollouts]
    first = np.cumsum([0, *(len(mask) for mask in masks)])
    prompts = [
        np.where(_numpy(inputs["prompt_mask"]).astype(bool), _numpy(inputs["prompt_ids"]), _PADDING)
        for inputs, _ in rollouts
    ]
    longest = max(prompt.shape[1] for prompt in prompts)
    low, high = planner.thresholds.hessian or (None, None)
    judged = "rule" if planner.rule else granularity
    return StepTokens(
        completion=np.concatenate([mask.nonzero()[0] + at for mask, at in zip(masks, first, strict=False)]).astype(
            "i4"
        ),
        token=np.concatenate([_numpy(inputs["completion_ids"][mask]) for inputs, mask in rollouts]).astype("i4"),
        advantage=np.concatenate([_numpy(batch.advantages.float()) for batch in batches]),
        m_h=np.concatenate([_numpy(batch.shifts.m_h) for batch in batches]),
        m_f=np.concatenate([_numpy(batch.shifts.m_f) for batch in batches]),
        log_pi=np.concatenate([_numpy(batch.layer.log_pi_a) for batch in batches]),
        missing_mass=np.concatenate([_numpy(batch.layer.missing_mass) for batch in batches]),
        keep=np.concatenate([_numpy(batch.keep) for batch in batches]),
        prompt=np.concatenate(
            [np.pad(p, ((0, 0), (longest - p.shape[1], 0)), constant_values=_PADDING) for p in prompts]
        ).astype("i4"),
        reward=np.concatenate([_rewards(inputs, len(mask)) for inputs, mask in rollouts]),
        about={
            "step": step,
            "mode": mode,
            "judged": judged,
            "temperature": planner.temperature,
            "fisher": _bound(planner.thresholds.fisher),
            "low": _bound(low),
            "high": _bound(high),
        },
    )


def write_step(run: str | Path, tokens: StepTokens) -> Path:
    """Write a step's tokens into a run's folder, whole or not at all; a step that is there already is replaced."""
    path = Path(run) / FOLDER / f"step-{tokens.about['step']:06d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(getattr(tokens, name)) for name in _ARRAYS}
    with written_whole(path) as unfinished:
        save_file(arrays, unfinished, metadata={"about": json.dumps(tokens.about, allow_nan=False)})
    return path


def read_step(path: str | Path) -> StepTokens:
    """Read a step's tokens.

    Raises `ValueError`, naming the file, if it is not what `write_step` writes.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["about"])
            tokens = StepTokens(**{name: file.get_tensor(name) for name in _ARRAYS}, about=about)
        if not _is_sound(tokens):
            raise ValueError
    except (OSError, SafetensorError, ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: not the tokens of a step as the trainer writes them; remove it") from None
    return tokens


def _is_sound(tokens: StepTokens) -> bool:
    """Whether arrays fit one another, and the rest is what a reader may rely on."""
    about, each = tokens.about, [getattr(tokens, name).shape for name in _ARRAYS if name not in ("prompt", "reward")]
    return (
        set(each) == {(len(tokens.keep),)}
        and tokens.keep.dtype == np.bool_
        and tokens.prompt.ndim == 2
        and tokens.prompt.shape[:1] == tokens.reward.shape
        and bool(np.isin(tokens.completion, np.arange(len(tokens.reward))).all() and (tokens.token >= 0).all())
        and isinstance(about["step"], int)
        and math.isfinite(about["temperature"])
        and all(isinstance(about[name], str) for name in ("mode", "judged"))
        and all(about[name] is None or math.isfinite(about[name]) for name in ("fisher", "low", "high"))
    )


def recorded_steps(run: str | Path) -> dict[int, Path]:
    """The files of the steps whose tokens were recorded, by step, in order."""
    found = ((_NAME.fullmatch(path.name), path) for path in (Path(run) / FOLDER).glob("step-*"))
    return dict(sorted((int(name[1]), path) for name, path in found if name))


def rewind_steps(run: str | Path, step: int) -> None:
    """Remove the records of later steps: a resumed run writes them again."""
    for later, path in recorded_steps(run).items():
        if later > step:
            path.unlink()


def most_rejected(steps: Iterable[StepTokens], count: int = 10) -> dict[int, list[Rejections]]:
    """By sign of the advantage, 1 and −1, the token ids rejected most often, at most `count` of each."""
    rejected: dict[int, Counter[int]] = {1: Counter(), -1: Counter()}
    seen: dict[int, Counter[int]] = {1: Counter(), -1: Counter()}
    for tokens in steps:
        for sign in (1, -1):
            signed = np.sign(tokens.advantage) == sign
            seen[sign].update(tokens.token[signed].tolist())
            rejected[sign].update(tokens.token[signed & ~tokens.keep].tolist())
    ranked: dict[int, list[Rejections]] = {}
    for sign, counts in rejected.items():
        rows = [Rejections(token, times, seen[sign][token]) for token, times in counts.items()]
        ranked[sign] = sorted(rows, key=lambda row: (-row.rejected, row.seen, row.token))[:count]
    return ranked


_ARRAYS = tuple(field.name for field in fields(StepTokens) if field.name != "about")


def _rewards(inputs: Mapping[str, Tensor], completions: int) -> NDArray[np.floating]:
    # a rollout that was resumed from a checkpoint without recording comes without its rewards
    known = inputs.get("capo_reward")
    return np.full(completions, np.nan, "f4") if known is None else _numpy(known.float())


def _numpy(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()


def _bound(value: float | None) -> float | None:
    """A bound, with None for an open side."""
    return None if value is None or math.isinf(value) else value
