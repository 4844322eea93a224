"""How a page says what a run's files call by a field's name."""

from __future__ import annotations

from typing import Any

from capo_rl.pages.page import Named, exact
from capo_rl.runs.secrets import without_secrets

# Where the name itself, with spaces, would not do.
_WORDS = {
    "reward_first": "reward, first tenth",
    "reward_last": "reward, last tenth",
    "reward_best": "reward, best tenth",
    "completions": "completions generated",
    "accepted_tokens": "tokens within bounds",
    "rejection_rate": "tokens out of bounds",
    "rejection_rate_positive": "of those with A > 0",
    "rejection_rate_negative": "of those with A < 0",
    "missing_mass": "probability outside the supports",
    "kl_measured_mean": "KL of an update, mean (nats a token)",
    "kl_measured_max": "KL of an update, largest",
    "grad_norm_max": "gradient norm, largest",
    "rewards_missing": "completions without a reward",
    "grader_timeouts": "answers that the grader gave up on",
    "seconds": "time",
    "seconds_curvature": "of it for the last layer",
    "seconds_kl": "of it for measuring KL",
    "dropped.ungradable": "problems left out, not gradable",
    "dropped.too_long": "problems left out, too long",
    "capo_fisher_threshold": "bound on m_F",
    "capo_hessian_low": "lower bound on m_H",
    "capo_hessian_high": "upper bound on m_H",
    "capo_fisher": "form of m_F",
    "capo_step": "model of the step",
    "capo_top_k": "rows of a support",
    "capo_top_p": "probability of a support",
    "capo_kl_budget": "KL budget (nats a token)",
    "capo_kl_control": "how the budget is kept",
    "capo_kl_every": "KL is measured every",
    "capo_kl_sample": "share of completions measured",
    "capo_kl_start": "slow start",
    "capo_share": "share of the step",
    "capo_soft": "soft weights",
    "capo_tokens_every": "tokens are recorded every",
    "model_name_or_path": "model",
    "dataset_name": "data",
    "output_dir": "folder",
}


def named(field: str) -> Named:
    """A field in words.

    >>> named("kl_measured_max").words, named("capo_mode").words, named("per_device_train_batch_size").words
    ('KL of an update, largest', 'mode', 'per device train batch size')
    """
    return Named(_WORDS.get(field) or field.removeprefix("capo_").replace("_", " ").replace(".", ", "), field)


def shown(field: str, value: Any) -> str:
    """A setting's value exactly as it was set, but for secrets, by their name or their form.

    >>> shown("hub_token", "abc"), shown("max_tokens", 5), shown("url", "https://me:pw@host/a?api_key=1&b=2")
    ('(not shown)', '5', 'https://(not shown)@host/a?(not shown)&b=2')
    """
    return exact(without_secrets(value, field))
