"""Training on completions of a server that speaks vLLM's protocol, whose policy may be another than the trainer's."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from test_trl import SOME, Watch, assert_bitwise_equal, logs, trajectory
from trl import GRPOConfig, GRPOTrainer

from capo_rl import CAPOTrainer
from capo_rl.settings.recipe import RecipeError, read_recipe
from capo_rl.trainers.step_choice import torch_optimizer
from capo_rl.trainers.train import make_trainer
from conftest import make_model
from vllm_server import Server, free_port, without_cuda

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


def test_a_server_that_is_not_there_is_told_in_a_sentence(tmp_path):
    server = ["--vllm_mode", "server", "--vllm_server_port", str(free_port()), "--vllm_server_timeout", "0.0"]
    overrides = ["--use_vllm", "true", *server, "--output_dir", str(tmp_path / "run")]
    with without_cuda(), pytest.raises(RecipeError, match="can't be trained so: The vLLM server can't be reached at"):
        make_trainer(read_recipe("quickstart", overrides))


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
        names = [name for name in other if name in ("loss", "reward", "grad_norm") or name.startswith("capo/")]
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
    assert_bitwise_equal(trajectory(build(capo_mode="mask", **dict.fromkeys(SOME), **settings)), stock)


# ---- with a lag: what CAPO reads off the loss has the ratio in it ----------------------------------------------------


@pytest.mark.parametrize(
    ("loss_type", "correction"),
    [*(("grpo", each) for each in MODES), *((each, "sequence_mask") for each in LOSSES[1:])],
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
        state = torch_optimizer(trainer).state.get(head) or {"exp_avg": torch.zeros(()), "exp_avg_sq": torch.zeros(())}
        steps.append(
            {
                "gradient": head.grad.clone(),
                "moments": [-state["exp_avg"].clone(), state["exp_avg_sq"].clone()],
                "batches": seen[2 * len(steps) :],
                "lr": trainer.planner.step.lr,
                "before": policies(trainer.model, seen[2 * len(steps) :]),
            }
        )

    ended = trainer.optimizer_steps.on_step_end

    def on_step_end(*args, **kwargs):
        steps[-1]["after"] = policies(trainer.model, steps[-1]["batches"])
        ended(*args, **kwargs)

    trainer.optimizer_steps.on_step_end = on_step_end
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
        before, after = each["before"], each["after"]
        kl = (before.exp() * (before - after)).sum(-1).mean()
        assert entry["capo/kl/measured"] == pytest.approx(float(kl), rel=1e-3)
        assert entry["capo/kl/predicted"] == pytest.approx(share**2 * float(torch.cat(predicted).mean()), rel=1e-3)
    assert any(each["gradient"].any() for each in steps)
    state = torch_optimizer(trainer).state[head]
    p, q = trainer.planner.step.moments(torch.arange(len(head)))
    torch.testing.assert_close(p.double(), -state["exp_avg"], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(q.double(), state["exp_avg_sq"], rtol=1e-3, atol=1e-10)


@torch.no_grad()
def policies(model, batches) -> torch.Tensor:
    """log π [n, V] at the tokens of some micro-batches, under the weights as they are."""
    found = []
    for batch in batches:
        inputs, mask = batch["inputs"], batch["mask"]
        ids, attention = (
            torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1) for name in ("ids", "mask")
        )
        logits = model(input_ids=ids, attention_mask=attention).logits
        found.append(logits[:, :-1][:, -mask.shape[1] :][mask].log_softmax(-1))
    return torch.cat(found)


def planned_policy(planned, vocabulary: int) -> torch.Tensor:
    """π [n, V] of a micro-batch's tokens, laid out over the vocabulary."""
    pi = torch.zeros(len(planned.keep), vocabulary, dtype=torch.float64)
    return pi.scatter(1, planned.layer.support, planned.layer.pi.double())


@pytest.mark.parametrize("threshold", [None, 0.0])
def test_the_share_counts_a_rejected_token_as_the_loss_would_have(build, serve, threshold):
    """With the ratio, and not at all in a sequence that `off_policy_mask_threshold` drops: the sampler's policy is too
    far from the present one, and the advantage is negative."""
    server = serve(lag=2)
    server.score = unsure
    trainer = build(
        loss_type="dr_grpo",
        capo_share=True,
        gradient_accumulation_steps=1,
        max_steps=3,
        off_policy_mask_threshold=threshold,
        vllm_importance_sampling_mode="token_truncate",
        **SOME,
        **CLIPPED,
        **server.settings(),
    )
    seen = spied(trainer)
    trainer.train()
    dropped = 0
    for each in seen:
        inputs, mask, planned = (each[name] for name in ("inputs", "mask", "planned"))
        a = inputs["advantages"][:, None] * ratios(trainer, inputs, mask)
        if threshold is not None:
            # at the first use of a batch, where the policy of the loss is that of `old_per_token_logps`
            apart = (inputs["sampling_per_token_logps"] - inputs["old_per_token_logps"]).nan_to_num(0.0)
            far = torch.where(mask, apart, 0.0).sum(1) / mask.sum(1) > threshold
            drop = far & (inputs["advantages"] < 0)
            a = a.where(~drop[:, None], 0.0)
            dropped += int(drop.sum())
        torch.testing.assert_close(planned.whole, (a / (len(a) * 6))[mask], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(planned.advantages, a[mask], rtol=1e-4, atol=1e-7)
        assert not planned.keep.all()
    assert dropped or threshold is None


def far_off(log_pi: torch.Tensor) -> torch.Tensor:
    """A sampler whose every other completion is from another policy."""
    log_pi = log_pi.clone()
    log_pi[::2] -= 1.0
    return log_pi


def test_kl_is_sampled_among_completions_that_the_loss_counts(build, serve):
    """The largest advantages were often those of masked sequences, of which the step has nothing."""
    server = serve()
    server.score = far_off
    trainer = build(
        capo_mode="trust_region",
        capo_kl_sample=0.25,
        gradient_accumulation_steps=1,
        vllm_importance_sampling_mode="sequence_mask",
        **server.settings(),
    )
    sampled = []
    trainer.add_callback(
        Watch(lambda: sampled.extend(each.weights[each.sample].clone() for each in trainer.updates.micro_batches))
    )
    entries = logs(trainer)
    assert all(entry["sampling/importance_sampling_ratio/min"] == 0 for entry in entries)
    assert len(sampled) == 5
    assert all(weights.all() for weights in sampled)


def test_a_step_of_which_only_masked_sequences_were_accepted_is_skipped(build, serve):
    """Its gradient is zero, and momentum would move the weights all the same."""
    server = serve()
    server.score = far_off
    trainer = build(max_steps=3, vllm_importance_sampling_mode="sequence_mask", **SOME, **server.settings())
    weights = []

    def look():
        weights.append(trainer.model.lm_head.weight.detach().clone())
        if len(weights) == 1:
            trainer._select = only_masked

    def only_masked(model, inputs, mask, *rest):
        out = (inputs["importance_sampling_ratio"] == 0).expand(mask.shape)[mask]
        trainer.planner.rule = lambda *_: out
        CAPOTrainer._select(trainer, model, inputs, mask, *rest)

    trainer.add_callback(Watch(look))
    entries = logs(trainer)
    weights.append(trainer.model.lm_head.weight.detach())
    assert [not torch.equal(one, other) for one, other in itertools.pairwise(weights)] == [True, False, False]
    assert [entry["capo/steps_skipped"] for entry in entries] == [0, 1, 2]
    assert 0 < entries[-1]["capo/rejection_rate"] < 1


def test_a_rule_sees_the_log_probs_of_the_policy_that_sampled(build, serve):
    server = serve(lag=1)
    server.score = unsure
    trainer = build(capo_mode="monitor", max_steps=2, **server.settings())
    seen, judged = spied(trainer), []
    trainer.planner.rule = lambda layer, advantages, shifts, before: (judged.append(before), advantages == 0)[1]
    trainer.train()
    for each, before in zip(seen, judged, strict=True):
        told = each["inputs"]["sampling_per_token_logps"][each["mask"]]
        assert told.isnan().any()
        torch.testing.assert_close(before, told.where(~told.isnan(), each["planned"].layer.log_pi_a))


@pytest.mark.parametrize("mode", ["off", "monitor", "mask", "trust_region"])
def test_tokens_that_the_sampler_could_not_score_are_told(build, serve, caplog, mode):
    server = serve()
    entries = logs(build(capo_mode=mode, max_steps=2, **server.settings()))
    assert all(entry["capo/unscored_tokens"] == 0 for entry in entries)
    assert "NaN" not in caplog.text
    server.score = unsure
    trainer = build(capo_mode=mode, max_steps=2, **server.settings())
    seen = []
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: (seen.append(generate(rows)), seen[-1])[1]
    entries = logs(trainer)
    counts = [int(each["sampling_per_token_logps"].isnan().sum()) for each in seen]
    assert [entry["capo/unscored_tokens"] for entry in entries] == counts
    assert all(counts)
    assert caplog.text.count("the server gave NaN") == 1
    assert all(math.isfinite(entry["loss"]) for entry in entries)


def test_a_ratio_that_is_not_finite_skips_the_step(build, serve):
    """A sampler that says a token was impossible, and no upper bound."""
    server = serve()
    trainer = build(
        max_steps=3,
        vllm_importance_sampling_mode="token_mask",
        vllm_importance_sampling_clip_max=None,
        **SOME,
        **server.settings(),
    )
    trainer.add_callback(Watch(lambda: setattr(server, "score", impossible)))
    entries = logs(trainer)
    assert [entry["capo/steps_skipped/nonfinite"] for entry in entries] == [0, 1, 2]
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


def impossible(log_pi: torch.Tensor) -> torch.Tensor:
    log_pi = log_pi.clone()
    log_pi[0, 0] = -math.inf
    return log_pi


def test_a_run_resumed_with_rollouts_still_in_use_is_the_same(build, serve, tmp_path):
    server = serve()
    server.score = unsure
    settings = {**SOME, **CLIPPED, "steps_per_generation": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    settings |= {"capo_share": True, "vllm_importance_sampling_mode": "token_mask"}
    whole = build(**settings, **server.settings())
    whole.train()
    resumed = build(**settings, **server.settings())
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert whole.planner.share.value == resumed.planner.share.value < 1
