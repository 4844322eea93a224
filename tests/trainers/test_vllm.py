"""Training on completions of a server that speaks vLLM's protocol, with the sampler's log-probabilities corrected for."""

from __future__ import annotations

import math

import pytest
import torch
from test_trl import SOME, Watch, assert_bitwise_equal, logs, trajectory
from trl import GRPOConfig, GRPOTrainer

from capo_rl import CAPOTrainer
from conftest import make_model
from vllm_server import Server, without_cuda

MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
LOSSES = ["grpo", "dr_grpo", "dapo", "bnpo"]
# In which some of the ratios are that `unsure` leaves, and others not.
CLIPPED = {"vllm_importance_sampling_clip_min": 0.7, "vllm_importance_sampling_clip_max": 1.3}


@pytest.fixture
def serve():
    """`serve(model, lag=...)`: a server that is there for the test."""
    with without_cuda():
        servers: list[Server] = []

        def serve(model=None, **settings):
            servers.append(Server(make_model() if model is None else model, **settings).__enter__())
            return servers[-1]

        yield serve
        for server in servers:
            server.__exit__()


def unsure(log_pi: torch.Tensor) -> torch.Tensor:
    """What a sampler of half precision might say, and nothing of the second token in every other completion."""
    log_pi = log_pi + 0.4 * (7 * torch.arange(log_pi.numel())).sin().view(log_pi.shape)
    log_pi[::2, 1] = math.nan
    return log_pi


def spied(trainer) -> list[dict]:
    """What goes into each loss: TRL's inputs, the mask, the planned micro-batch."""
    seen: list[dict] = []
    select = trainer._select

    def spy(model, inputs, mask, hidden, logps):
        given = dict(inputs)
        select(model, inputs, mask, hidden, logps)
        seen.append({"inputs": given, "mask": mask, "planned": trainer.planner.micro_batches[-1]})

    trainer._select = spy
    return seen


def ratios(trainer, inputs, mask) -> torch.Tensor:
    """The correction of each token [B, T], from the two log-probabilities and the words of TRL's documentation."""
    args = trainer.args
    difference = torch.where(mask, inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"], 0.0)
    difference = torch.where(difference.isnan(), 0.0, difference)
    if args.vllm_importance_sampling_mode.startswith("sequence"):
        difference = difference.sum(1, keepdim=True)
    ratio = difference.exp()
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    inside = (ratio >= low) & (ratio <= high)
    clipped = ratio.clamp(low, high) if args.vllm_importance_sampling_mode.endswith("truncate") else ratio * inside
    return clipped.expand(mask.shape)


# ---- the server ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stateful", [False, True])
def test_the_server_has_all_that_the_client_asks_for(build, stateful):
    with without_cuda(stateful), Server(make_model()) as server:
        trainer = build(max_steps=2, **server.settings())
        generate = trainer._generate_and_score_completions
        outputs = []
        trainer._generate_and_score_completions = lambda rows: (outputs.append(generate(rows)), outputs[-1])[1]
        trainer.train()
    update = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"]
    joined = ["/health", "/v1/models", "/server_info", "/get_world_size", "/init_weight_transfer_engine"]
    assert server.requests == [*joined, "/server_info", *[*update, "/v1/completions"] * 2]
    for inputs in outputs:
        mask = inputs["completion_mask"].bool()
        told, own = inputs["sampling_per_token_logps"][mask], inputs["old_per_token_logps"][mask]
        torch.testing.assert_close(told, own, rtol=1e-4, atol=1e-5)
        assert (inputs["importance_sampling_ratio"] - 1).abs().max() < 1e-3


@pytest.mark.parametrize("lag", [0, 2])
def test_completions_are_those_of_the_weights_so_many_updates_ago(build, serve, lag):
    server = serve(lag=lag)
    trainer = build(capo_mode="trust_region", capo_kl_start=1.0, capo_kl_budget=1e-4, **server.settings())
    before, used = [], []
    generate = trainer._generate_single_turn

    def spy(*args, **kwargs):
        before.append({name: weight.detach().clone() for name, weight in trainer.model.named_parameters()})
        made = generate(*args, **kwargs)
        used.append({name: weight.clone() for name, weight in server.model.named_parameters()})
        return made

    trainer._generate_single_turn = spy
    entries = logs(trainer)
    assert any(entry["capo/kl/fraction"] < 1 for entry in entries)  # a step taken back is taken back there too
    for step, weights in enumerate(used):
        expected = before[max(0, step - lag)]
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


# ---- without a lag, a server is another place to generate ------------------------------------------------------------


class Again(CAPOTrainer):
    """Generates what another trainer's server has generated."""

    def _generate_single_turn(self, *args, **kwargs):
        return self.left.pop(0), None


SHARED = {"capo_mode": "mask", "capo_share": True}
WATCHED = {"capo_mode": "trust_region", "capo_watch": True, "capo_kl_start": 1.0}


@pytest.mark.parametrize(
    ("mode", "correction"),
    [
        *((SHARED, correction) for correction in ("none", *MODES)),
        *(({"capo_mode": "shorten"}, correction) for correction in ("none", "token_truncate")),
        *((WATCHED, correction) for correction in ("none", "sequence_mask")),
    ],
    ids=str,
)
def test_without_a_lag_a_run_is_that_of_plain_generation(build, serve, mode, correction):
    server = serve()
    settings = {**SOME, **mode, "max_steps": 3}
    corrected = {"vllm_importance_sampling_correction": correction != "none"}
    if correction != "none":
        corrected["vllm_importance_sampling_mode"] = correction
    entries, seen = [], []
    for kind, more in ((CAPOTrainer, corrected | server.settings()), (Again, {})):
        trainer = build(kind, **settings, **more)
        trainer.left = server.completions
        seen.append(spied(trainer))
        entries.append(logs(trainer))
    exact = {"rel": 0, "abs": 0} if correction == "none" else {"rel": 1e-3, "abs": 1e-6}
    for one, other in zip(*entries, strict=True):
        names = [name for name in one if name in ("loss", "reward", "grad_norm") or name.startswith("capo/")]
        assert {"capo/token/m_f/mean", "capo/rejection_rate"} <= set(names)
        for name in names:
            if not name.endswith("seconds"):
                assert one[name] == pytest.approx(other[name], nan_ok=True, **exact), name
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one["planned"].keep, other["planned"].keep)
        torch.testing.assert_close(
            one["planned"].shifts.m_f, other["planned"].shifts.m_f, rtol=exact["rel"], atol=exact["abs"]
        )


@pytest.mark.parametrize("correction", ["none", "token_truncate", "sequence_mask"])
def test_off_and_monitor_are_trl_bit_for_bit_through_the_same_server(build, serve, correction):
    server = serve(lag=2)
    server.score = unsure
    settings = {**CLIPPED, "loss_type": "grpo", "beta": 0.02, **server.settings()}
    settings["vllm_importance_sampling_correction"] = correction != "none"
    if correction != "none":
        settings["vllm_importance_sampling_mode"] = correction
    stock = trajectory(build(GRPOTrainer, GRPOConfig, **settings))
    assert any(tensor.any() for step in stock[1] for tensor in step.values())
    assert_bitwise_equal(trajectory(build(capo_mode="off", **settings)), stock)
    assert_bitwise_equal(trajectory(build(capo_mode="monitor", **SOME, **settings)), stock)
    open_bounds = {name: None for name in SOME}
    assert_bitwise_equal(trajectory(build(capo_mode="mask", **open_bounds, **settings)), stock)


# ---- with a lag: what CAPO reads off the loss has the ratio in it ----------------------------------------------------


@pytest.mark.parametrize(
    ("loss_type", "correction"), [*(("grpo", each) for each in MODES), *((each, "sequence_mask") for each in LOSSES[1:])]
)
def test_a_token_weighs_what_the_loss_gives_it(build, serve, correction, loss_type):
    """Accepted tokens A·w over the accepted ones, w from the two log-probabilities; a NaN is a ratio of one."""
    server = serve(lag=2)
    server.score = unsure
    trainer = build(
        loss_type=loss_type,
        gradient_accumulation_steps=1,
        max_steps=4,
        vllm_importance_sampling_mode=correction,
        **SOME,
        **CLIPPED,
        **server.settings(),
    )
    seen = spied(trainer)
    trainer.train()
    apart, rejected = [], []
    for each in seen:
        inputs, mask, planned = (each[name] for name in ("inputs", "mask", "planned"))
        keep = mask.clone()
        keep[mask] = planned.keep
        ratio = ratios(trainer, inputs, mask)
        a = inputs["advantages"][:, None] * ratio * keep
        expected = {
            "grpo": a / keep.sum(1, keepdim=True).clamp(min=1) / len(a),
            "bnpo": a / keep.sum().clamp(min=1),
            "dapo": a / keep.sum().clamp(min=1),
            "dr_grpo": a / (len(a) * 6),
        }[loss_type]
        torch.testing.assert_close(planned.weights, expected[mask], rtol=1e-4, atol=1e-7)
        apart.append(ratio[mask])
        rejected.append(~planned.keep)
        missing = inputs["sampling_per_token_logps"].isnan()
        assert missing.any()
        if correction.startswith("token"):
            assert (inputs["importance_sampling_ratio"][missing] == 1).all()
    ratio, rejected = torch.cat(apart), torch.cat(rejected)
    edges = (0.7, 1.3) if correction.endswith("truncate") else (0.0, 0.0)
    assert all((ratio == edge).any() for edge in edges)
    assert ((ratio > 0.7) & (ratio < 1.3) & (ratio != 1)).any()
    assert 0 < rejected.sum() < len(rejected)


@pytest.mark.parametrize(
    ("mode", "correction"),
    [*(("mask", each) for each in MODES), ("monitor", "token_mask"), ("shorten", "sequence_truncate")],
)
def test_shifts_moments_and_kl_are_those_of_a_dense_step(build, serve, mode, correction):
    """In float64, against autograd's gradient of the head and the optimizer's own state, over the whole vocabulary."""
    model = make_model().double()
    server = serve(model, lag=2)
    server.score = unsure
    trainer = build(
        model=model,
        capo_mode=mode,
        capo_share=mode != "monitor",
        capo_top_k=None,
        max_grad_norm=0.0,
        max_steps=3,
        vllm_importance_sampling_mode=correction,
        **SOME,
        **CLIPPED,
        **server.settings(),
    )
    head = trainer.model.lm_head.weight
    seen = spied(trainer)
    steps = []

    def look():
        state = trainer._optimizer().state.get(head) or {"exp_avg": torch.zeros(()), "exp_avg_sq": torch.zeros(())}
        steps.append(
            {
                "gradient": head.grad.clone(),
                "moments": [-state["exp_avg"].clone(), state["exp_avg_sq"].clone()],
                "batches": seen[2 * len(steps) :],
                "lr": trainer.planner.step.lr,
            }
        )

    trainer.add_callback(Watch(look))
    entries = logs(trainer)
    b1, b2, eps = 0.9, 0.999, 1e-8

    def adam(moments, g, step, lr):
        p, q = b1 * moments[0] + (1 - b1) * g, b2 * moments[1] + (1 - b2) * g**2
        return lr * p / (1 - b1**step) / ((q / (1 - b2**step)).sqrt() + eps)

    for number, (each, entry) in enumerate(zip(steps, entries, strict=True), start=1):
        total, predicted = torch.zeros_like(head), []
        for batch in each["batches"]:
            planned, mask, inputs = batch["planned"], batch["mask"], batch["inputs"]
            advantages = (inputs["advantages"][:, None] * ratios(trainer, inputs, mask))[mask].double()
            hidden, actions = planned.layer.hidden.double(), inputs["completion_ids"][mask]
            pi = planned_policy(planned, len(head))
            u = torch.nn.functional.one_hot(actions, len(head)) - pi
            total += torch.einsum("n,nv,nd->vd", planned.weights.double(), u, hidden)
            for i in range(0, len(actions), 3):
                step = adam(each["moments"], advantages[i] * torch.outer(u[i], hidden[i]), number, each["lr"])
                v = step @ hidden[i]
                s, c = u[i] @ v, pi[i] @ v**2 - (pi[i] @ v) ** 2
                torch.testing.assert_close(planned.shifts.m_f[i].double(), 0.5 * s**2, rtol=1e-4, atol=1e-9)
                m_h = advantages[i] * (s + 0.5 * (s**2 - c))
                torch.testing.assert_close(planned.shifts.m_h[i].double(), m_h, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(total, -each["gradient"], rtol=1e-4, atol=1e-7)
        whole = adam(each["moments"], -each["gradient"], number, each["lr"])
        for batch in each["batches"]:
            planned = batch["planned"]
            pi, v = planned_policy(planned, len(head)), planned.layer.hidden.double() @ whole.T
            predicted.append(0.5 * ((pi * v**2).sum(1) - (pi * v).sum(1) ** 2))
        share = entry["capo/share"] if mode != "monitor" else 1.0
        assert entry["capo/kl/predicted"] == pytest.approx(share**2 * float(torch.cat(predicted).mean()), rel=1e-3)
    assert any(each["gradient"].any() for each in steps)
    state = trainer._optimizer().state[head]
    p, q = trainer.planner.step.moments(torch.arange(len(head)))
    torch.testing.assert_close(p.double(), -state["exp_avg"], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(q.double(), state["exp_avg_sq"], rtol=1e-3, atol=1e-10)


def planned_policy(planned, vocabulary: int) -> torch.Tensor:
    """π [n, V] of a micro-batch's tokens, laid out over the vocabulary."""
    pi = torch.zeros(len(planned.keep), vocabulary, dtype=torch.float64)
    return pi.scatter(1, planned.layer.support, planned.layer.pi.double())
