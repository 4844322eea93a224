"""The README.md beside a run's checkpoints: what the model was, how it was trained, and what to cite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import yaml

ARXIV = "2510.00819"
TITLE = "Stabilizing Policy Gradients for Sample-Efficient Reinforcement Learning in LLM Reasoning"
CITATION = f"""@misc{{melo2025capo,
  title         = {{{{{TITLE}}}}},
  author        = {{Melo, Luckeciano C. and Abate, Alessandro and Gal, Yarin}},
  year          = {{2025}},
  eprint        = {{{ARXIV}}},
  archivePrefix = {{arXiv}},
  primaryClass  = {{cs.LG}},
  url           = {{https://arxiv.org/abs/{ARXIV}}}
}}"""
_WAYS = {
    "trust_region": "GRPO in a trust region",
    "mask": "CAPO, which leaves the tokens out of the gradient whose predicted shift is out of bounds",
    "shorten": "GRPO with steps as long as CAPO's accepted tokens have earned",
    "monitor": "GRPO, watched by CAPO, which changed nothing",
    "off": "GRPO",
}


def model_card(
    name: str,
    base: str,
    mode: str,
    versions: Mapping[str, str],
    *,
    on_hub: bool = False,
    dataset: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """The card's text; `base` is the model that was trained, an id on the hub where `on_hub`.

    >>> "a fine-tuned version of `embedded`" in model_card("run", "embedded", "mask", {})
    True
    """
    head: dict[str, object] = {
        "library_name": "transformers",
        "model_name": name,
        "tags": ["generated_from_trainer", *tags],
    }
    if on_hub:
        head["base_model"] = base
    base = f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base}`"
    trained_on = f" on `{dataset}`" if dataset else ""
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {name}

This model is a fine-tuned version of {base}{trained_on}. It was trained with capo-rl (`capo_mode: {mode}`) on
[TRL](https://github.com/huggingface/trl): {_WAYS[mode]}.
CAPO, Curvature-Aware Policy Optimization, was introduced in
[{TITLE}](https://arxiv.org/abs/{ARXIV}) (arXiv {ARXIV}).

## Versions

{chr(10).join(f"- {library} {version}" for library, version in versions.items())}

## Citation

```bibtex
{CITATION}
```
"""
