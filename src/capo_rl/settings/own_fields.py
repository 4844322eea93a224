"""CAPO's own fields, without TRL: help about them, and a first look at a recipe, need not wait for torch."""

# No `from __future__ import annotations` here: the HF argument parser reads the annotations at run time.
from dataclasses import dataclass, field

from capo_rl.planning.defaults import KL_START

CHOICES = {
    "capo_mode": ("off", "monitor", "mask", "shorten", "trust_region"),
    "capo_advantage": ("group", "reward"),
    "capo_granularity": ("token", "sequence", "group", "batch"),
    "capo_step": ("auto", "adam", "sgd"),
    "capo_units": ("plain", "translated"),
    "capo_fisher": ("sampled", "expected"),
    "capo_moments": ("float32", "bfloat16"),
    "capo_kl_control": ("learning_rate", "copy", "optimizer"),
}


@dataclass
class CAPOFields:
    """What `CAPOConfig` adds to TRL's settings: each field, its default, and what it is for."""

    capo_mode: str = field(
        default="trust_region",
        metadata={
            "help": "`trust_region` leaves no token out and makes each step as long as capo_kl_budget allows. `mask`, "
            "the paper's method, leaves rejected tokens out of the gradient. `shorten` leaves no token out and "
            "multiplies the step by the share of the accepted ones. `monitor` computes and logs the same and changes "
            "nothing; `off` is TRL's own trainer.",
            "choices": CHOICES["capo_mode"],
        },
    )
    capo_advantage: str = field(
        default="group",
        metadata={
            "help": "`group`: TRL's group-relative advantage (GRPO, Dr.GRPO). `reward`: the raw reward (REINFORCE).",
            "choices": CHOICES["capo_advantage"],
        },
    )
    capo_granularity: str = field(
        default="token",
        metadata={
            "help": "What is accepted or rejected as one: a token (the paper's choice), or a sequence, group or batch, "
            "each as far as it lies inside one micro-batch.",
            "choices": CHOICES["capo_granularity"],
        },
    )
    capo_fisher_threshold: float | None = field(
        default=1e-4,
        metadata={"help": "delta_F: a token is kept if m_F <= delta_F (Eq. 11, Table 4). `inf` or null: no bound."},
    )
    capo_hessian_low: float | None = field(
        default=-1e-2,
        metadata={"help": "Lower bound on m_H (Eq. 11, Table 4). `-inf` or null: no bound."},
    )
    capo_hessian_high: float | None = field(
        default=1e-2,
        metadata={"help": "Upper bound on m_H (Eq. 11, Table 4). `inf` or null: no bound."},
    )
    capo_step: str = field(
        default="auto",
        metadata={
            "help": "The model of the optimizer's step on the last layer (Section 4.1); `auto`: the optimizer's own. "
            "Where it is neither, the modes that decide by shifts are refused.",
            "choices": CHOICES["capo_step"],
        },
    )
    capo_units: str = field(
        default="plain",
        metadata={
            "help": "`plain`: the bounds are for m_F and m_H as they are (the paper). `translated`: for what they "
            "would be at the learning rate and size of the paper's model, so that one bound means the same for "
            "another model. Not in the paper.",
            "choices": CHOICES["capo_units"],
        },
    )
    capo_fisher: str = field(
        default="sampled",
        metadata={
            "help": "m_F from the sampled action (`sampled`, Eq. 58) or its exact expectation over actions "
            "(`expected`, lower variance).",
            "choices": CHOICES["capo_fisher"],
        },
    )
    capo_top_k: int | None = field(
        default=50,
        metadata={"help": "Vocabulary rows kept for each token (Section 4.1); null or k >= V: the whole vocabulary."},
    )
    capo_top_p: float | None = field(
        default=None,
        metadata={
            "help": "Of these rows only the likeliest, up to this probability, and the sampled one: less time where "
            "the policy is sure, and what is left out is bounded by 1 - p. null: all of capo_top_k. Not in the paper."
        },
    )
    capo_moments: str = field(
        default="float32",
        metadata={
            "help": "How the Adam step model keeps its moments, two numbers for each weight of a row seen so far.",
            "choices": CHOICES["capo_moments"],
        },
    )
    capo_shard_moments: bool = field(
        default=False,
        metadata={
            "help": "With several processes each keeps an equal part of these moments, and fetches those of its tokens "
            "from the others: less memory, and more that is handed over. With one process it does nothing."
        },
    )
    capo_max_missing_mass: float = field(
        default=0.1,
        metadata={
            "help": "A token whose support misses more probability than this is counted in "
            "`capo/missing_mass/above_bound`, and a warning is given."
        },
    )
    capo_share: bool = field(
        default=True,
        metadata={
            "help": "With capo_mode `mask`: multiply the step by the share of the accepted tokens, as long as Adam "
            "would make it had it seen the rejected ones. Not in the paper: false is its mask."
        },
    )
    capo_soft: bool = field(
        default=False,
        metadata={
            "help": "In place of the mask: weigh a token that is out of bounds by what brings its own step back in. "
            "Not in the paper."
        },
    )
    capo_penalty: float | None = field(
        default=None,
        metadata={
            "help": "In place of the mask: take this times m_F off each token's objective; the bounds then only count. "
            "Not in the paper. null: off."
        },
    )
    capo_kl_budget: float | None = field(
        default=None,
        metadata={
            "help": "The trust region, in nats a token: no update is left that moves the policy further, as measured "
            "on capo_kl_sample of the step's completions. null: 5e-3 with capo_mode `trust_region`, otherwise no "
            "budget. Not in the paper."
        },
    )
    capo_kl_control: str = field(
        default="learning_rate",
        metadata={
            "help": "How the budget is kept. `learning_rate`: at most the schedule's, it is set so that updates have "
            "a tenth of the budget on average, and one above the budget is taken back in part. `copy`, `optimizer`: "
            "the schedule's rate, and every update above the budget is taken back in part, from a copy of the weights "
            "or as Adam's state tells it.",
            "choices": CHOICES["capo_kl_control"],
        },
    )
    capo_kl_start: float = field(
        default=KL_START,
        metadata={
            "help": "Slow start of capo_kl_control `learning_rate`: the share of learning_rate that the first step may "
            "have, at most doubled by each step after it."
        },
    )
    capo_kl_every: int | None = field(
        default=None,
        metadata={
            "help": "Measure the KL of every n-th update, one forward pass each; null: of those that are logged."
        },
    )
    capo_kl_sample: float = field(
        default=0.25,
        metadata={
            "help": "The share of a step's completions on which KL is measured: those with the largest advantages."
        },
    )
    capo_watch: bool = field(
        default=False,
        metadata={
            "help": "With capo_mode `trust_region`: also compute and log m_H, m_F, what the bounds would reject and "
            "the predicted KL, by which nothing is decided there. The other modes always have them."
        },
    )
    capo_tokens_every: int | None = field(
        default=None,
        metadata={
            "help": "Record what each token of every n-th step got, for `capo explain`: shifts, verdict, log pi. Of "
            "several processes the main one records its share. capo_mode `trust_region` needs capo_watch for it. "
            "null: never."
        },
    )
