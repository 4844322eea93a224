"""The optimizer's planned step on the last layer: ΔW = U, for SGD and for Adam (Section 4.1, "Modeling the Step")."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capo_rl.curvature.kernels import uses_triton
from capo_rl.curvature.kernels.adam_shifts import Adam, adam_direction, momentum_direction, square_root
from capo_rl.curvature.kernels.moment_update import fused_update_moments, update_moments
from capo_rl.curvature.last_layer import SHARED_ROWS, RowGradient
from capo_rl.curvature.processes import Processes
from capo_rl.curvature.sharded_moments import Shard


@dataclass
class SGDStep:
    """Gradient ascent, U = α g.

    >>> SGDStep(lr=0.5).plan(torch.ones(1, 2), torch.tensor([0]))
    tensor([[0.5000, 0.5000]])
    """

    lr: float

    def at(self, rows: Int[Tensor, "*rows"], alike: bool = False) -> SGDStep:
        """Itself: it has nothing to fetch."""
        return self

    def plan(self, gradient: Float[Tensor, "rows d"], rows: Int[Tensor, "rows"]) -> Float[Tensor, "rows d"]:
        """The step on some rows of W, given the gradient there."""
        return self.lr * gradient

    def direction(
        self,
        score: Float[Tensor, "tokens k"],
        hidden: Float[Tensor, "tokens d"],
        rows: Int[Tensor, "tokens k"],
        sizes: Int[Tensor, "tokens"] | None = None,
    ) -> Float[Tensor, "tokens k"]:
        """v = U h = α ‖h‖² score for each token's own gradient score hᵀ."""
        return self.lr * hidden.to(score.dtype).square().sum(-1, keepdim=True) * score

    def update(self, gradient: RowGradient, scale: float = 1.0) -> None:
        """Nothing: SGD has no memory."""

    def state_dict(self, here: bool = True) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device | None = None) -> None:
        if state:
            raise ValueError(f"SGDStep has no state, but was given {sorted(state)}: the run used another step model")


class AdamStep:
    """Adam's ascent step U = α p̂ / (√q̂ + ε), with moments (P, Q) kept for the vocabulary rows seen so far.

    For a gradient g the planned moments are p = β₁P + (1−β₁)g and q = β₂Q + (1−β₂)g², elementwise, bias-corrected
    for the step to come (Kingma & Ba, 2015). `torch.optim.Adam` adds ε outside the root, and so does this; the
    paper's line has it inside. A row that no gradient has touched has P = Q = 0 and takes no memory.

    Planning changes nothing; `update` advances the moments, once per optimizer step. `moment_dtype=torch.bfloat16`
    halves their memory; by default they have the gradient's dtype.

    With several `processes` each keeps the moments of an equal part of these rows (`sharded_moments`). `update`,
    `state_dict` and `at` are collective then, and moments are read in the step that `at` returns, which fetches them.
    """

    def __init__(
        self,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        moment_dtype: torch.dtype | None = None,
        processes: Processes | None = None,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} must lie in [0, 1)")
        if not eps > 0:
            raise ValueError(f"eps={eps} must be above 0: a row without history would step by 0/0")
        if moment_dtype not in (None, torch.bfloat16):
            raise ValueError(f"moment_dtype={moment_dtype}: None or torch.bfloat16; float16 has no room for squares")
        self.lr, self.betas, self.eps, self.moment_dtype = lr, betas, eps, moment_dtype
        self.steps = 0
        self.processes = processes
        self._shard = Shard.of(processes)
        # Slot 0 is a row of zeros that every untouched vocabulary row points to; behind the last used slot is room.
        # Of several processes each knows all slots, and has the moments of its own.
        self._slot = torch.zeros(0, dtype=torch.long)
        self._used = 1
        self._p = self._q = torch.zeros(1, 0)

    @property
    def planned(self) -> Adam:
        """The scalars of the step to come."""
        root2 = math.sqrt(1 - self.betas[1] ** (self.steps + 1))
        return Adam(self.lr * root2 / (1 - self.betas[0] ** (self.steps + 1)), *self.betas, root2 * self.eps)

    @property
    def rows(self) -> Int[Tensor, "rows"]:
        """The vocabulary rows that have moments, ascending."""
        return self._slot.nonzero().squeeze(1)

    def at(self, rows: Int[Tensor, "*rows"], alike: bool = False) -> AdamStep:
        """The step with the moments of `rows` to read, fetched from the processes that keep them; collective.

        `alike`: all processes give the same rows. At rows that have moments and were not asked for it raises
        `IndexError`.
        """
        if self._shard is None:
            return self
        step = copy.copy(self)
        step._shard = None
        if self._p.shape[1]:
            wanted = torch.zeros(self._used, dtype=torch.bool, device=rows.device)
            wanted[self._slots(rows)] = True
            wanted[0] = False
            slots = wanted.nonzero().squeeze(1)
            step._p, step._q = self._shard.fetched(self._p, self._q, slots, alike)
            step._used = len(step._p)
            place = torch.full_like(wanted, -1, dtype=torch.long)  # no row of what was fetched
            place[0] = 0
            place[slots] = torch.arange(1, step._used, device=rows.device)
            step._slot = place[self._slot]
        return step

    def moments(self, rows: Int[Tensor, "rows"]) -> tuple[Float[Tensor, "rows d"], Float[Tensor, "rows d"]]:
        """P and Q at `rows`, zero for rows never touched."""
        slots = self.slots(rows)
        return self._p.index_select(0, slots), self._q.index_select(0, slots)

    def slots(self, rows: Int[Tensor, "*rows"]) -> Int[Tensor, "*rows"]:
        """Where the moments of `rows` are stored; 0 for a row never touched.

        Raises `RuntimeError` where they are spread over processes.
        """
        if self._shard is not None:
            raise RuntimeError(
                "the moments are spread over processes, and this one has a part of them: read those of step.at(rows), "
                "which fetches them"
            )
        return self._slots(rows)

    def _slots(self, rows: Tensor) -> Tensor:
        known = len(self._slot)
        if not known:
            return torch.zeros_like(rows)
        return self._slot[rows.clamp(max=known - 1)].where(rows < known, 0)

    def storage(
        self, width: int, like: Tensor
    ) -> tuple[Float[Tensor, "slots {width}"], Float[Tensor, "slots {width}"]]:
        """P and Q as they are stored here, where `slots` points to; a row of zeros before any update."""
        if self._p.shape[1]:
            held = self._held(self._used)
            return self._p[:held], self._q[:held]
        zeros = like.new_zeros(1, width)
        return zeros, zeros

    def plan(self, gradient: Float[Tensor, "rows d"], rows: Int[Tensor, "rows"]) -> Float[Tensor, "rows d"]:
        """The step on some rows of W, given the gradient there."""
        adam = self.planned
        if self.steps:
            gradient = gradient.to(torch.promote_types(gradient.dtype, self._p.dtype))
            p, q = (moment.to(gradient.dtype) for moment in self.moments(rows))
            p.lerp_(gradient, 1 - adam.beta1)
            q.lerp_(gradient.square(), 1 - adam.beta2)
        else:
            p = (1 - adam.beta1) * gradient
            q = gradient.square().mul_(1 - adam.beta2)
        return p.div_(square_root(q).add_(adam.eps)).mul_(adam.lr)

    def direction(
        self,
        score: Float[Tensor, "tokens k"],
        hidden: Float[Tensor, "tokens d"],
        rows: Int[Tensor, "tokens k"],
        sizes: Int[Tensor, "tokens"] | None = None,
    ) -> Float[Tensor, "tokens k"]:
        """v = U h for each token's own gradient score hᵀ.

        `sizes`: how many of the first entries of a row count, None: all. What v is at the others is left open.
        """
        p, q = self.storage(hidden.shape[1], score)
        slots = self.slots(rows)
        entries = rows.numel() if sizes is None else int(sizes.sum())
        if len(p) * len(rows) > SHARED_ROWS * entries or (own := score.any(dim=-1)).all():
            return adam_direction(score, hidden, slots, p, q, self.planned, sizes)
        v = torch.empty_like(score)
        own_sizes = None if sizes is None else sizes[own]
        v[own] = adam_direction(score[own], hidden[own], slots[own], p, q, self.planned, own_sizes)
        v[~own] = momentum_direction(hidden[~own], slots[~own], p, q, self.planned).to(v.dtype)
        return v

    def update(self, gradient: RowGradient, scale: float = 1.0) -> None:
        """Advance the moments by one optimizer step with `scale` times the gradient of the loss's accepted tokens.

        The gradient is that of the objective (ascent), under the loss's own weights; `scale` is the factor of
        gradient clipping. Rows the gradient does not name have a gradient of zero, so their moments decay.
        """
        rows, shard = gradient.rows, self._shard
        if (rows.diff() <= 0).any():
            raise ValueError("the gradient has several subsets: the moments follow that of the whole batch")
        if shard is not None and gradient.processes is None:
            raise ValueError(
                "the moments are spread over processes, and the gradient is that of one: give row_gradient the rows of "
                "SupportRows.over(processes)"
            )
        self._grow(rows, gradient.hidden.shape[1], gradient.values)
        held = self._held(self._used)
        p, q = self._p[:held], self._q[:held]
        slots = self._slots(rows) if shard is None else shard.places(self._slots(rows))
        if uses_triton(p) and p.dtype == torch.float32 and gradient.processes is None:
            fused_update_moments(p, q, slots, gradient, scale, self.betas)
        else:
            # another seed in each process, so that no two rows are rounded alike
            seed = self.steps if shard is None else self.steps * shard.count + shard.number
            update_moments(p, q, slots, gradient, scale, self.betas, seed)
        self.steps += 1

    def state_dict(self, here: bool = True) -> dict[str, Tensor]:
        """The moments by row, in the order they are stored in, and the number of steps, as tensors.

        The same whether moments are spread over processes or not, and then on the CPU; without `here` this process gets
        nothing, and hands in what the others get.
        """
        rows = self.rows
        rows = rows[self._slot[rows].argsort()]
        if self._shard is not None:
            p, q = self._shard.whole(self._p, self._q, len(rows), here)
            rows = rows.cpu()
        elif here:
            p, q = self.moments(rows)
        return {"rows": rows, "p": p, "q": q, "steps": torch.tensor(self.steps)} if here else {}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device | None = None) -> None:
        """Restore what `state_dict` gave, bit for bit, on `device` or where it is; of several processes a part."""
        missing = {"rows", "p", "q", "steps"} - set(state)
        if missing:
            raise ValueError(f"the state of an AdamStep lacks {sorted(missing)}: the run used another step model")
        rows = state["rows"].to(device=device)
        self.steps = int(state["steps"])
        self._slot = torch.zeros(int(rows.max()) + 1 if len(rows) else 0, dtype=torch.long, device=rows.device)
        self._slot[rows] = torch.arange(1, len(rows) + 1, device=rows.device)
        self._used = len(rows) + 1
        own = slice(None) if self._shard is None else slice(self._shard.number, None, self._shard.count)
        p, q = (state[name][own].to(device=device, dtype=self.moment_dtype) for name in ("p", "q"))
        self._p, self._q = (torch.cat([each.new_zeros(1, each.shape[1]), each]) for each in (p, q))

    def _held(self, used: int) -> int:
        """How many of so many used slots are stored here."""
        return used if self._shard is None else self._shard.held(used - 1)

    def _grow(self, rows: Tensor, width: int, like: Tensor) -> None:
        """Make room for the rows that are new, and at least as much as there was, so that copies stay rare."""
        if not self._p.shape[1]:
            self._p = torch.zeros(1, width, dtype=self.moment_dtype or like.dtype, device=like.device)
            self._q = torch.zeros_like(self._p)
            self._slot = self._slot.to(like.device)
        if not len(rows):
            return
        if int(rows[-1]) >= len(self._slot):
            room = self._slot.new_zeros(int(rows[-1]) + 1 - len(self._slot))
            self._slot = torch.cat([self._slot, room])
        new = rows[self._slot[rows] == 0]
        stop = self._used + len(new)
        self._slot[new] = torch.arange(self._used, stop, device=rows.device)
        held, needed = self._held(self._used), self._held(stop)
        if needed > len(self._p):
            room = self._p.new_zeros(max(needed, 2 * held) - held, width)
            self._p = torch.cat([self._p[:held], room])
            self._q = torch.cat([self._q[:held], room])
        self._used = stop
