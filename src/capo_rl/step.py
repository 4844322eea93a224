"""The optimizer's planned step on the last layer: ΔW = U, for SGD and for Adam (Section 4.1, "Modeling the Step")."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from capo_rl.last_layer import RowGradient, tile_elements


@dataclass
class SGDStep:
    """Gradient ascent, U = α g.

    >>> SGDStep(lr=0.5).plan(torch.ones(1, 2), torch.tensor([0]), slice(0, 2))
    tensor([[0.5000, 0.5000]])
    """

    lr: float

    def plan(self, gradient: Tensor, rows: Tensor, dims: slice) -> Tensor:
        """The step on some rows and columns of W, given the gradient there."""
        return self.lr * gradient

    def update(self, gradient: RowGradient, scale: float = 1.0) -> None:
        """Nothing: SGD has no memory."""

    def shorten_momentum(self, fraction: float) -> None:
        """Nothing: SGD has no memory."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError(f"SGDStep has no state, but was given {sorted(state)}: the run used another step model")


class AdamStep:
    """Adam's ascent step U = α p̂ / (√q̂ + ε), with moments (P, Q) kept for the vocabulary rows seen so far.

    For a gradient g the planned moments are p = β₁P + (1−β₁)g and q = β₂Q + (1−β₂)g², elementwise, bias-corrected
    for the step to come (Kingma & Ba, 2015). `torch.optim.Adam` adds ε outside the root, and so does this; the
    paper's line has it inside. A row that no gradient has touched has P = Q = 0 and takes no memory.

    Planning changes nothing; `update` advances the moments, once per optimizer step.
    """

    def __init__(self, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} must lie in [0, 1)")
        if not eps > 0:
            raise ValueError(f"eps={eps} must be above 0: a row without history would step by 0/0")
        self.lr, self.betas, self.eps = lr, betas, eps
        self.steps = 0
        # Slot 0 is a row of zeros that every untouched vocabulary row points to.
        self._slot = torch.zeros(0, dtype=torch.long)
        self._p = self._q = torch.zeros(1, 0)

    @property
    def rows(self) -> Tensor:
        """The vocabulary rows that have moments, [R], ascending."""
        return self._slot.nonzero().squeeze(1)

    def moments(self, rows: Tensor, dims: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """P and Q at `rows` [R] and columns `dims`: two [R, width] tensors, zero for rows never touched."""
        slots = self._slots(rows)
        return self._p[:, dims].index_select(0, slots), self._q[:, dims].index_select(0, slots)

    def plan(self, gradient: Tensor, rows: Tensor, dims: slice) -> Tensor:
        """The step on some rows and columns of W, given the gradient there.

        gradient [..., width] and rows [...]: the vocabulary row that each vector of the gradient belongs to.
        """
        beta1, beta2 = self.betas
        if self.steps:
            gradient = gradient.to(self._p.dtype)
            slots = self._slots(rows.reshape(-1))
            p = self._p[:, dims].index_select(0, slots).view_as(gradient).lerp_(gradient, 1 - beta1)
            q = self._q[:, dims].index_select(0, slots).view_as(gradient).lerp_(gradient.square(), 1 - beta2)
        else:
            p = (1 - beta1) * gradient
            q = gradient.square().mul_(1 - beta2)
        # The corrections are scalars: outside root and quotient they cost one pass over the tile in place of three.
        root2 = math.sqrt(1 - beta2 ** (self.steps + 1))
        return p.div_(q.sqrt_().add_(root2 * self.eps)).mul_(self.lr * root2 / (1 - beta1 ** (self.steps + 1)))

    def update(self, gradient: RowGradient, scale: float = 1.0) -> None:
        """Advance the moments by one optimizer step with `scale` times the gradient of the loss's accepted tokens.

        The gradient is that of the objective (ascent), under the loss's own weights; `scale` is the factor of
        gradient clipping. Rows the gradient does not name have a gradient of zero, so their moments decay.
        """
        beta1, beta2 = self.betas
        rows = gradient.rows
        if (rows.diff() <= 0).any():
            raise ValueError("the gradient has several subsets: the moments follow that of the whole batch")
        hidden = gradient.hidden
        self._grow(rows, hidden.shape[1], gradient.weights)
        self._p *= beta1
        self._q *= beta2
        slots = self._slots(gradient.rows)
        width = max(1, tile_elements(hidden.device) // max(1, len(rows)))
        for start in range(0, hidden.shape[1], width):
            dims = slice(start, start + width)
            g = scale * gradient.columns(dims)
            self._p[:, dims].index_add_(0, slots, g, alpha=1 - beta1)
            self._q[:, dims].index_add_(0, slots, g.square(), alpha=1 - beta2)
        self.steps += 1

    def shorten_momentum(self, fraction: float) -> None:
        """Multiply P by the fraction of the last step that was taken (`trust_region.shorten_momentum`)."""
        self._p *= fraction

    def state_dict(self) -> dict[str, Tensor]:
        """The moments by row and the number of steps, as tensors."""
        rows = self.rows
        p, q = self.moments(rows)
        return {"rows": rows, "p": p, "q": q, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave; bit for bit."""
        missing = {"rows", "p", "q", "steps"} - set(state)
        if missing:
            raise ValueError(f"the state of an AdamStep lacks {sorted(missing)}: the run used another step model")
        rows, p, q = state["rows"], state["p"], state["q"]
        self.steps = int(state["steps"])
        self._slot = torch.zeros(int(rows.max()) + 1 if len(rows) else 0, dtype=torch.long, device=rows.device)
        self._slot[rows] = torch.arange(1, len(rows) + 1, device=rows.device)
        self._p = torch.cat([p.new_zeros(1, p.shape[1]), p])
        self._q = torch.cat([q.new_zeros(1, q.shape[1]), q])

    def _slots(self, rows: Tensor) -> Tensor:
        """Where the moments of `rows` are stored; 0 for a row never touched."""
        known = len(self._slot)
        if not known:
            return torch.zeros_like(rows)
        return self._slot[rows.clamp(max=known - 1)].where(rows < known, 0)

    def _grow(self, rows: Tensor, width: int, like: Tensor) -> None:
        """Make room for the rows that are new."""
        if not self._p.shape[1]:
            self._p = torch.zeros(1, width, dtype=like.dtype, device=like.device)
            self._q = torch.zeros_like(self._p)
            self._slot = self._slot.to(like.device)
        if not len(rows):
            return
        if int(rows[-1]) >= len(self._slot):
            room = self._slot.new_zeros(int(rows[-1]) + 1 - len(self._slot))
            self._slot = torch.cat([self._slot, room])
        new = rows[self._slot[rows] == 0]
        self._slot[new] = torch.arange(len(self._p), len(self._p) + len(new), device=rows.device)
        self._p = torch.cat([self._p, self._p.new_zeros(len(new), width)])
        self._q = torch.cat([self._q, self._q.new_zeros(len(new), width)])
