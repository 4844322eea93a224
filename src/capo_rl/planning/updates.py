"""The updates of a run, counted and measured: all that a trust region needs of them, and nothing predicted."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from capo_rl.curvature.head import Head
from capo_rl.curvature.last_layer import LastLayer, last_layer, log_pi_of, logit_chunks
from capo_rl.curvature.processes import Processes
from capo_rl.planning.divergence import measured_kl
from capo_rl.planning.micro_batch import Seen
from capo_rl.planning.telemetry import missing_mass, synchronise

logger = logging.getLogger(__name__)

# What is counted from the start of a run.
_COUNTERS = ("steps_skipped", "steps_nonfinite")


class Moved(NamedTuple):
    """How far a step moved the policy: the mean KL(π ‖ π') in nats a token, the same number in every process; each
    token's KL and, where it was predicted, its m_F, of all processes."""

    mean: float
    kl: Float[Tensor, "tokens"]
    m_f: Float[Tensor, "tokens"] | None = None


class Updates:
    """One optimizer step after another: the tokens on which each will be measured, how far it went, how many were left
    out. `Planner` is one that also predicts, and decides.

    `look` at the tokens of each forward pass, have each `Seen` watch the loss's log-probabilities, then `commit` before
    the optimizer's step, or `skip` where it is left out; after it `measured_kl`. The first `look` after either begins
    the next step. All but `look` are collective.

    Raises `RuntimeError`, naming the call that is missing or too many, for a loop that commits twice, or whose number
    of processes changes.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        max_missing_mass: float = 1.0,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes()
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.max_missing_mass = max_missing_mass
        self.micro_batches: list[Any] = []
        self.steps_skipped = 0
        self.steps_nonfinite = 0  # those of the skipped whose gradient was not finite
        self._seconds = 0.0
        self._warned = False
        self._over = False  # whether the step that is collected was committed or skipped
        self._count: int | None = None  # of processes, since the first token

    @torch.no_grad()
    def look(
        self,
        hidden: Float[Tensor, "sampled d"],
        logits: Float[Tensor, "sampled vocabulary"] | Iterable[Tensor] | Head,
        actions: Int[Tensor, "sampled"],
        sample: Bool[Tensor, "tokens"],
    ) -> Seen:
        """Keep the last layer at the tokens of a micro-batch that `sample` marks, to measure the update on them;
        `hidden`, `actions` and `logits`, or the `Head` that makes them, are theirs."""
        self._begin()
        with self._timed(hidden.device):
            layer = self._layer(hidden.detach(), logits, actions)
        seen = Seen(layer, sample)
        self.micro_batches.append(seen)
        return seen

    @property
    def is_empty(self) -> bool:
        """Whether the step has no token at all, in any process."""
        if not self.micro_batches:
            return True
        device = self.micro_batches[0].layer.hidden.device
        return not self.processes.total(torch.tensor(sum(each.tokens for each in self.micro_batches), device=device))

    @property
    def has_gradient(self) -> bool:
        """Whether any token of the step has a weight in its gradient, in any process."""
        weighed = [batch.weights.any() for batch in self.micro_batches if batch.weights is not None]
        return bool(weighed) and bool(self.processes.total(torch.stack(weighed).sum()))

    @torch.no_grad()
    def commit(self, scale: float = 1.0, describe: bool = True) -> dict[str, float]:
        """The step is about to be taken: return the figures.

        Raises `RuntimeError` if the backward pass did not report a micro-batch's weights, and where there is no step to
        commit; `ValueError` for weights of another shape.
        """
        self._check_commit()
        self._over = True
        return self._tails()

    @torch.no_grad()
    def skip(self, describe: bool = True, nonfinite: bool = False) -> dict[str, float]:
        """The step is left out, for no token of it can be measured or its gradient is `nonfinite`: count it, return the
        figures."""
        self._count_skipped(nonfinite)
        return self._tails()

    @torch.no_grad()
    def measured_kl(self, now: Callable[[int], Tensor], head: Head | None) -> Moved:
        """How far the step just taken moved the policy at the sampled tokens, whose hidden states after it are
        `now(i)` [m, d] in micro-batch i; `head` is the head after it, and without one they are the logits [m, V].
        Raises `RuntimeError` before `commit`."""
        return self._moved([batch.layer for batch in self.micro_batches], now, head)

    def counts(self) -> dict[str, float]:
        """How many steps of the run were left out, as it is logged."""
        return {
            "capo/steps_skipped": float(self.steps_skipped),
            "capo/steps_skipped/nonfinite": float(self.steps_nonfinite),
        }

    def state_dict(self, here: bool = True) -> dict[str, Tensor]:
        """The counters, as tensors by name; without `here` this process gets nothing."""
        return {name: torch.tensor(getattr(self, name)) for name in _COUNTERS} if here else {}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device | None = None) -> None:
        """Go on from what `state_dict` gave."""
        for name in _COUNTERS:
            setattr(self, name, int(state[name]))

    def clear(self) -> float:
        """Forget the micro-batches of a step that is over, or broken off; returns the seconds spent on it."""
        seconds, self._seconds = self._seconds, 0.0
        self.micro_batches = []
        self._over = False
        return seconds

    def _layer(self, hidden: Tensor, logits: Tensor | Iterable[Tensor] | Head, actions: Tensor) -> LastLayer:
        """The last layer at some tokens, by a head or of the logits it gave."""
        settings: Any = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        if isinstance(logits, Head):
            return logits.last_layer(hidden, actions, **settings)
        chunks = logit_chunks(logits, len(hidden))
        return LastLayer.cat([last_layer(hidden[at], z, actions[at], **settings) for at, z in chunks])

    def _moved(self, layers: list[LastLayer], now: Callable[[int], Tensor], head: Head | None) -> Moved:
        """The KL from each layer's policy to that of the hidden states now, or of the logits where there is no head."""
        if not self._over:
            raise RuntimeError("measured_kl came before commit: call commit before the optimizer's step")
        log_pi = log_pi_of if head is None else head.log_pi
        kls = [measured_kl(layer, log_pi(now(i), layer.support, self.temperature)) for i, layer in enumerate(layers)]
        kl = self.processes.gather(torch.cat(kls))
        # processes of different machines may sum in another order, and must go back equally far
        mean = float(kl.double().mean()) if len(kl) else math.nan
        return Moved(self.processes.agreed(mean, kl.device), kl)

    def _begin(self) -> None:
        """The first micro-batch of the next step forgets the last one's."""
        if self._over:
            self.clear()
        self._check_processes()

    def _count_skipped(self, nonfinite: bool) -> None:
        self._check_open("skip")
        self._over = True
        self.steps_skipped += 1
        self.steps_nonfinite += nonfinite

    def _tails(self) -> dict[str, float]:
        """What the supports leave out at the sampled tokens of all processes."""
        if not self.micro_batches:
            return {}
        with self._timed(self.micro_batches[0].layer.hidden.device):
            mass = self.processes.gather(torch.cat([batch.layer.missing_mass for batch in self.micro_batches]))
            figures = missing_mass(mass, self.max_missing_mass)
        self._warn_of_missing_mass(figures.get("capo/missing_mass/above_bound", 0.0), len(mass))
        return figures

    def _check_open(self, call: str) -> None:
        """Raises `RuntimeError` where the step is over already."""
        self._check_processes()
        if self._over:
            raise RuntimeError(
                f"{call} came after commit or skip of the same step, and the moments would count it twice: call each "
                "once a step, and plan for the tokens of the next before it"
            )

    def _check_commit(self) -> None:
        self._check_open("commit")
        if not self.micro_batches:
            raise RuntimeError("commit came without a token: call plan for each micro-batch before it")
        for i, batch in enumerate(self.micro_batches):
            for name in ("weights", "whole"):
                each = getattr(batch, name, None)
                if each is not None and each.shape != (batch.tokens,):
                    raise ValueError(
                        f"{name} of micro-batch {i} has shape {tuple(each.shape)}, and {batch.tokens} tokens were "
                        f"planned: give one each, [{batch.tokens}], as `watch` and `masked` do"
                    )
        if any(batch.weights is None for batch in self.micro_batches):
            raise RuntimeError(
                "the loss's gradient never reached the log-probabilities CAPO watched, so it can't be known what the "
                "step is made of: the loss has to be made of what `watch` was given, and its backward pass comes "
                "before commit; this version of a trainer may compute its loss another way"
            )

    def _check_processes(self) -> None:
        count = self.processes.count
        if self._count not in (None, count):
            raise RuntimeError(
                f"the planner began with {self._count} processes and there are {count}: with another number make a "
                "new Planner, and give it this one's state_dict"
            )
        self._count = count

    def _warn_of_missing_mass(self, above: float, tokens: int) -> None:
        if above and not self._warned:
            self._warned = True
            logger.warning(
                "%d of %d tokens have more than %g of their probability outside the top k=%s%s: raise %s, or "
                "capo_max_missing_mass to accept it (said once; capo/missing_mass/above_bound goes on counting)",
                above,
                tokens,
                self.max_missing_mass,
                self.top_k,
                "" if self.top_p is None else f" up to p={self.top_p:g}",
                "capo_top_k" if self.top_p is None else "capo_top_k and capo_top_p",
            )

    @contextmanager
    def _timed(self, device: torch.device) -> Iterator[None]:
        synchronise(device)
        start = time.perf_counter()
        yield
        synchronise(device)
        self._seconds += time.perf_counter() - start
