"""The measured KL of an update: KL(π ‖ π') at each token, on the support that was kept from before it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from capo_rl.curvature.last_layer import LastLayer


def measured_kl(layer: LastLayer, log_pi: Float[Tensor, "tokens k"]) -> Float[Tensor, "tokens"]:
    """KL(π ‖ π') in nats, from the last layer before an update and log π' on its support after it.

    The rows outside the support are taken as one event of probability m, so the figure is a lower bound on the KL
    over the whole vocabulary, and equal to it where the support is the whole. With δ = log π'/π it is summed as
    Σ π (e^δ − 1 − δ), which equals −Σ π δ for distributions and, unlike it, keeps its digits for small updates and
    is never negative.

    >>> import torch
    >>> from capo_rl.curvature.last_layer import last_layer
    >>> z = torch.tensor([[0.0, 1.0]])
    >>> measured_kl(last_layer(torch.ones(1, 1), z, torch.tensor([0])), z.log_softmax(-1))
    tensor([0.])
    """
    pi, missing = layer.pi, layer.missing_mass
    # a row listed twice in the support has π = 0 the second time; it must count in neither sum
    counted = pi > 0
    kl = _excess(pi, log_pi - pi.log(), counted).sum(-1)
    missing_after = (1 - log_pi.exp().where(counted, 0).sum(-1)).clamp(min=0)
    # below float precision the difference of the two tails is noise
    tail = (missing > 1e-6) & (missing_after > 1e-6)
    return kl + _excess(missing, missing_after.log() - missing.log(), tail)


def _excess(pi: Tensor, delta: Tensor, where: Tensor) -> Tensor:
    return (pi * (delta.expm1() - delta)).where(where, 0)
