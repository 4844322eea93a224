"""The oracle: shifts of the last layer from dense autograd in float64, sharing no helper with the fast forms.

It builds the full [V·d, V·d] Hessian and Fisher matrices and takes the step with `torch.optim` itself, so it is for
small V and d only: for tests, and for checking the theory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor


def log_policy(
    weight: Float[Tensor, "vocabulary d"], hidden: Float[Tensor, "tokens d"], temperature: float
) -> Float[Tensor, "tokens vocabulary"]:
    """log π of the softmax policy with head `weight` at hidden states."""
    return torch.log_softmax(hidden @ weight.T / temperature, dim=-1)


def objective(
    weight: Float[Tensor, "vocabulary d"],
    hidden: Float[Tensor, "tokens d"],
    actions: Int[Tensor, "tokens"],
    advantages: Float[Tensor, "tokens"],
    temperature: float,
) -> Float[Tensor, ""]:
    """The mean over tokens of A π(a)/π_now(a), whose gradient is Eq. 7 and whose Hessian is Eq. 8."""
    taken = log_policy(weight, hidden, temperature)[torch.arange(len(actions)), actions]
    return (advantages * (taken - taken.detach()).exp()).mean()


def gradient(
    weight: Float[Tensor, "vocabulary d"],
    hidden: Float[Tensor, "tokens d"],
    actions: Int[Tensor, "tokens"],
    advantages: Float[Tensor, "tokens"],
    temperature: float,
) -> Float[Tensor, "vocabulary d"]:
    """∇_W of `objective`."""
    leaf = weight.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(objective(leaf, hidden, actions, advantages, temperature), leaf)
    return grad


def hessian(
    weight: Float[Tensor, "vocabulary d"],
    hidden: Float[Tensor, "tokens d"],
    actions: Int[Tensor, "tokens"],
    advantages: Float[Tensor, "tokens"],
    temperature: float,
) -> Float[Tensor, "vocabulary*d vocabulary*d"]:
    """∇²_W of `objective` (Eq. 8)."""

    def of_vector(psi: Tensor) -> Tensor:
        # the ratio's denominator stays at the present policy while the numerator is differentiated twice
        now = log_policy(weight.detach(), hidden, temperature)[torch.arange(len(actions)), actions]
        taken = log_policy(psi.view_as(weight), hidden, temperature)[torch.arange(len(actions)), actions]
        return (advantages * (taken - now).exp()).mean()

    return torch.autograd.functional.hessian(of_vector, weight.detach().reshape(-1))


def fisher(
    weight: Float[Tensor, "vocabulary d"],
    hidden: Float[Tensor, "tokens d"],
    actions: Int[Tensor, "tokens"],
    temperature: float,
    kind: str = "sampled",
) -> Float[Tensor, "vocabulary*d vocabulary*d"]:
    """The Fisher matrix of the last layer.

    `sampled` (Eq. 9, 58): the mean of the scores' outer products at the actions taken.
    `expected`: the Hessian at zero of the mean KL(π ‖ π_ΔW), which has the expectation over actions taken exactly.
    """
    if kind == "expected":
        now = log_policy(weight.detach(), hidden, temperature)

        def divergence(psi: Tensor) -> Tensor:
            return (now.exp() * (now - log_policy(psi.view_as(weight), hidden, temperature))).sum(-1).mean()

        return torch.autograd.functional.hessian(divergence, weight.detach().reshape(-1))

    def scores(psi: Tensor) -> Tensor:
        return log_policy(psi.view_as(weight), hidden, temperature)[torch.arange(len(actions)), actions]

    jacobian = torch.autograd.functional.jacobian(scores, weight.detach().reshape(-1))
    return jacobian.T @ jacobian / len(actions)


def optimizer_step(
    weight: Float[Tensor, "vocabulary d"],
    grad: Float[Tensor, "vocabulary d"],
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
) -> Float[Tensor, "vocabulary d"]:
    """ΔW of one ascent step that a `torch.optim` optimizer takes from `weight` along `grad`.

    `optimizer` builds it for a list of parameters and may load a state into it; it minimises, so it is handed −grad.
    """
    parameter = weight.detach().clone().requires_grad_()
    parameter.grad = -grad
    optimizer([parameter]).step()
    return parameter.detach() - weight


def subset_shifts(
    weight: Float[Tensor, "vocabulary d"],
    hidden: Float[Tensor, "tokens d"],
    actions: Int[Tensor, "tokens"],
    advantages: Float[Tensor, "tokens"],
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    *,
    temperature: float = 1.0,
    kind: str = "sampled",
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, "vocabulary d"]]:
    """m_H, m_F (Eq. 10) and ΔW for one subset of tokens, in float64 and from dense matrices."""
    weight, hidden, advantages = weight.double(), hidden.double(), advantages.double()
    grad = gradient(weight, hidden, actions, advantages, temperature)
    delta = optimizer_step(weight, grad, optimizer)
    psi = delta.reshape(-1)
    curvature = hessian(weight, hidden, actions, advantages, temperature)
    information = fisher(weight, hidden, actions, temperature, kind)
    m_h = grad.reshape(-1) @ psi + 0.5 * psi @ curvature @ psi
    m_f = 0.5 * psi @ information @ psi
    return m_h, m_f, delta
