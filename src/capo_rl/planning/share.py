"""The share ρ of the step that the accepted tokens have earned: a shorter step where some are left out, under Adam too.

SGD's step gets shorter when tokens are left out of the gradient. Adam divides by the root of a second moment that never
saw them, so its step stays as long and goes wholly into the tokens that are left. With g_all the last-layer gradient
the loss would have had with nothing rejected, g_acc its accepted part under the same denominators, and both squared
norms averaged as Adam averages q,

    ρ = min(1, √(Σ_t β₂^{n−t} ‖g_acc,t‖² / Σ_t β₂^{n−t} ‖g_all,t‖²))

is by how much Adam's step on the last layer would be shorter, had its second moment seen every token. Not in the paper.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from capo_rl.curvature.last_layer import LastLayer, SupportRows, blocks, row_gradient, support_rows, tile_rows


def squared_norms(
    layer: LastLayer, weights: Float[Tensor, "sets tokens"], rows: SupportRows | None = None
) -> Float[Tensor, "sets"]:
    """‖Σ_i w_i u_i h_iᵀ‖² for each set of weights, on the tokens' supports.

    `rows`: those of `support_rows`; over all processes where the sum is to run over their tokens, then collective.

    >>> from capo_rl.curvature.last_layer import last_layer
    >>> layer = last_layer(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    >>> squared_norms(layer, torch.tensor([[1.0], [2.0]]))      # ‖u‖² ‖h‖² = ½ · 25
    tensor([12.5000, 50.0000], dtype=torch.float64)
    """
    rows = support_rows(layer) if rows is None else rows
    gradients = [row_gradient(layer, each, rows) for each in weights]
    sums = torch.zeros(len(gradients), dtype=torch.float64, device=layer.u.device)
    for pairs in blocks(len(rows.rows), tile_rows(layer.hidden.shape[1], layer.u.device)):
        sums += torch.stack([gradient.part(pairs).double().square().sum() for gradient in gradients])
    return sums


class Share:
    """ρ over the steps of a run; `beta2` is Adam's. 1 before the first step, and while every gradient was zero.

    >>> share = Share(beta2=0.5)
    >>> share.update(accepted=1.0, everyone=4.0)
    >>> share.value
    0.5
    >>> share.update(accepted=4.0, everyone=4.0)        # √((½ · 1 + 4) / (½ · 4 + 4))
    >>> round(share.value, 4)
    0.866
    """

    def __init__(self, beta2: float) -> None:
        self.beta2 = beta2
        self.accepted = self.everyone = 0.0

    @property
    def value(self) -> float:
        return min(1.0, math.sqrt(self.accepted / self.everyone)) if self.everyone > 0 else 1.0

    def update(self, accepted: float, everyone: float) -> None:
        """Take in a step's ‖g_acc‖² and ‖g_all‖²; one that is not finite is left out."""
        if math.isfinite(accepted) and math.isfinite(everyone):
            self.accepted = self.beta2 * self.accepted + accepted
            self.everyone = self.beta2 * self.everyone + everyone

    def state_dict(self) -> dict[str, float]:
        return {"accepted": self.accepted, "everyone": self.everyone}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.accepted, self.everyone = state["accepted"], state["everyone"]
