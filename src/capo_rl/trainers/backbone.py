"""The hidden states of a trainer's forward passes, and the head that makes logits of them.

TRL fuses the output head into the loss, so neither logits nor a call of `lm_head` is to be seen. The backbone is a
module, and runs once for each loss; a forward hook there yields the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import is_peft_model
from torch import Tensor, nn

from capo_rl.curvature.head import Head


class Backbone:
    """The backbone and the head of a trainer's model, whatever it is wrapped in."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._unwrapped: tuple[Any, Any] | None = None  # a model, and the causal language model inside it

    def causal_lm(self, model: Any) -> Any:
        """The causal language model inside its wrappers, looked for once: Accelerate takes milliseconds to unwrap."""
        if self._unwrapped is None or self._unwrapped[0] is not model:
            causal_lm = self.trainer.accelerator.unwrap_model(model)
            self._unwrapped = model, causal_lm.get_base_model() if is_peft_model(causal_lm) else causal_lm
        return self._unwrapped[1]

    @contextmanager
    def hidden_states(self, model: nn.Module, logits_to_keep: int) -> Iterator[list[Tensor]]:
        """Collects the hidden states [B, T, d] that predict the last `logits_to_keep` tokens in a forward pass.

        Raises `RuntimeError` unless the backbone ran exactly once.
        """
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(output[0].detach()[:, :-1][:, -logits_to_keep:])

        handle = self.causal_lm(model).base_model.register_forward_hook(keep)
        try:
            yield seen
        finally:
            handle.remove()
        if len(seen) != 1:
            raise RuntimeError(
                f"the hook on the backbone fired {len(seen)} times in one forward pass instead of once: CAPO can't "
                "see the hidden states of this model, and does not train on without them"
            )

    def head(self, model: nn.Module) -> Head:
        """What makes logits of hidden states, as the model has it now."""
        causal_lm = self.causal_lm(model)
        head = causal_lm.get_output_embeddings()
        return Head(head.weight, head.bias, _logit_scale(causal_lm), self.trainer.accelerator.autocast)


def _logit_scale(causal_lm: Any) -> float:
    """The factor between W h and the logits, as TRL's fused head reads it from the model's config."""
    config = causal_lm.config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling
