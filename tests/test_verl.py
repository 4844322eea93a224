"""The verl adapter on a CPU: verl's own FSDP engine, loss, workers and Ray, with the tiny model.

verl is no dependency of the tests: without it only the first ones run. docs/verl.md says how to install it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import capo_rl
from capo_rl import CAPOTrainer, Thresholds
from conftest import make_model, make_tokenizer

HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipes" / "verl"
HAS_VERL = importlib.util.find_spec("verl") is not None
needs_verl = pytest.mark.skipif(not HAS_VERL, reason="verl is not installed (docs/verl.md)")
pytestmark = pytest.mark.filterwarnings("ignore")  # of verl, Ray and torch to one another

if HAS_VERL:
    os.environ |= {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "verl_cpu,capo_rl.verl"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import verl  # noqa: F401 (which loads capo_rl.verl by its own setting)
        from verl.trainer.config import CheckpointConfig
        from verl.workers.config import FSDPActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
        from verl.workers.engine.base import EngineRegistry
        from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
        from verl.workers.utils.losses import ppo_loss
        from verl.workers.utils.padding import no_padding_2_padding

        from capo_rl.runs.saved_state import STATE_FILE, load_state
        from capo_rl.verl import AGGREGATIONS, MASKABLE_LOSSES, CAPOActorConfig, CAPOEngine, CAPOSettings
        from verl_cpu import fsdp1_on_cpu, packed, run_trainer, small_run, update, workers_on_ray

MASK = {"mode": "mask"}
OPEN = {"mode": "mask", "share": False, "fisher_threshold": None, "hessian_low": None, "hessian_high": None}
BOUNDS = {"fisher_threshold": 0.04, "hessian_low": -0.15, "hessian_high": 0.15}  # rejects some tokens, keeps others
NARROW = {"mode": "mask", "share": False} | BOUNDS
BUDGET = {"share": True, "kl_budget": 2e-3, "kl_start": 0.1, "kl_sample": 1.0}
LENGTHS = ("share", "scale", "learning_rate", "kl/measured", "kl/proposed", "kl/fraction", "kl/predicted", "weight")
LENGTHS = {f"capo/{name}" for name in LENGTHS}


# ---- without verl ----------------------------------------------------------------------------------------------------


def test_without_verl_the_error_names_the_extra():
    code = "import sys; sys.modules['verl'] = None; import capo_rl.verl"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: capo_rl.verl needs verl" in done.stderr
    assert "capo-rl[verl]" in done.stderr


def test_no_other_module_imports_verl():
    package = Path(capo_rl.__file__).parent
    assert (package / "verl" / "engine.py").exists()
    others = [file for file in package.rglob("*.py") if file.parent != package / "verl"]
    assert not [file for file in others if "import verl" in (text := file.read_text()) or "from verl" in text]


# ---- an engine and a batch -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A process group of one, as verl's engine needs it."""
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def engine(tmp_path, one_process):
    """`engine(capo={...})`: verl's FSDP engine with CAPO on the tiny model, and verl's loss with the same settings."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")

    def engine(
        kind=None,
        capo=None,
        remove_padding=True,
        optimizer=None,
        model=None,
        precision="fp32",
        strategy="fsdp2",
        **actor,
    ):
        built = watched(kind or CAPOEngine)(
            HFModelConfig(
                path=str(tmp_path / "model"),
                use_remove_padding=remove_padding,
                override_config={"attn_implementation": "sdpa"},
                **({"enable_gradient_checkpointing": False} | (model or {})),
            ),
            engine_config(precision, strategy),
            FSDPOptimizerConfig(lr=1e-2, weight_decay=0.0, total_training_steps=10, **(optimizer or {})),
            CheckpointConfig(),
        )
        if strategy == "fsdp":
            fsdp1_on_cpu()
        built.initialize()
        return built, partial(ppo_loss, config=actor_config(capo, strategy=strategy, **actor))

    return engine


def engine_config(precision="fp32", strategy="fsdp2"):
    precision = {"param_dtype": precision, "reduce_dtype": "fp32"}
    return FSDPEngineConfig(strategy=strategy, mixed_precision=precision, use_torch_compile=False)


def actor_config(capo=None, **fields):
    fields = {"strategy": "fsdp2", "rollout_n": 4, "ppo_micro_batch_size_per_gpu": 4} | fields
    return FSDPActorConfig(**fields) if capo is None else CAPOActorConfig(capo=capo, **fields)


def watched(kind):
    """The engine, which also notes what it had before each optimizer step."""

    class Watched(kind):
        def initialize(self):
            super().initialize()
            self.verdicts, self.weights, self.gradients, self.shifts = [], [], [], []

        def optimizer_step(self):
            planner = getattr(self, "planner", None)
            if planner is not None:
                self.verdicts.append([batch.keep for batch in planner.micro_batches])
                self.weights.append([batch.weights for batch in planner.micro_batches])
                self.shifts.append([batch.shifts for batch in planner.micro_batches])
            gradients = (weight.grad for weight in self.module.parameters() if weight.requires_grad)
            self.gradients.append([whole(gradient).clone() for gradient in gradients])
            return super().optimizer_step()

    return Watched


def make_batch(seed=0, sequences=8, **changes):
    """A mini-batch of random tokens, with lengths and advantages that differ, in verl's padded form."""
    draw = torch.Generator().manual_seed(seed)
    prompts, responses = (torch.randint(3, 32, (sequences, n), generator=draw) for n in (3, 6))
    lengths = torch.randint(2, 7, (sequences, 1), generator=draw)
    return {
        "prompts": prompts,
        "responses": responses,
        "response_mask": (torch.arange(6) < lengths).long(),
        "advantages": torch.randn(sequences, 1, generator=draw).expand(-1, 6).contiguous(),
    } | changes


def with_old_log_probs(engine, batch, **how):
    """The batch with log π as verl's trainer has it before an update: from the engine's own forward pass."""
    data = packed(batch, **how)
    with engine.eval_mode():
        log_probs = engine.infer_batch(data)["model_output"]["log_probs"]
    return batch | {"old_log_probs": no_padding_2_padding(log_probs, packed(batch, **how))}


def train(engine, loss, batches, **how):
    """One optimizer step for each batch; returns what verl would log."""
    outputs = []
    for batch in batches:
        with engine.train_mode():
            outputs.append(engine.train_batch(packed(batch, **how), loss))
        engine.lr_scheduler_step()
    return outputs


def weights_of(engine):
    return {name: whole(each).clone() for name, each in engine.module.state_dict().items()}


def whole(tensor):
    # of one process `full_tensor` is the tensor itself, and FSDP1's is no DTensor
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---- loading and settings --------------------------------------------------------------------------------------------


@needs_verl
def test_verl_loads_the_engine_by_its_own_setting():
    assert EngineRegistry.get_engine_cls("language_model", "fsdp") is CAPOEngine
    assert EngineRegistry.get_engine_cls("language_model", "fsdp2") is CAPOEngine
    code = "import sys, verl; print('capo_rl.verl' in sys.modules)"
    for modules, loaded in ((os.environ.get("VERL_USE_EXTERNAL_MODULES", ""), "True"), ("verl_cpu", "False")):
        given = os.environ | {"VERL_USE_EXTERNAL_MODULES": modules, "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=given)
        assert done.stdout.split()[-1:] == [loaded], done.stderr[-2000:]


@needs_verl
def test_settings_have_the_defaults_of_the_trl_adapter():
    from dataclasses import fields

    from capo_rl import CAPOConfig

    assert {field.name for field in fields(CAPOSettings)} == {
        name for name in CAPOConfig.__dataclass_fields__ if name.startswith("capo_")
    }
    for field in fields(CAPOSettings):
        assert field.default == CAPOConfig.__dataclass_fields__[field.name].default, field.name


@needs_verl
def test_settings_survive_verls_config_tree():
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass

    with initialize_config_dir(str(RECIPE), version_base=None):
        config = compose("capo_aggressive", ["actor_rollout_ref.actor.capo.fisher_threshold=1e-5"])
        actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        off = compose("capo_aggressive", ["actor_rollout_ref.actor.capo.mode=off"])
    assert isinstance(actor, CAPOActorConfig)
    assert actor.capo == CAPOSettings(capo_mode="mask", capo_share=False, capo_step="adam", capo_fisher_threshold=1e-5)
    assert (actor.optim.lr, actor.loss_agg_mode, actor.fsdp_config.strategy) == (
        1.5e-5,
        "seq-mean-token-mean",
        "fsdp2",
    )
    assert omega_conf_to_dataclass(off.actor_rollout_ref.actor).capo.capo_mode == "off"


@needs_verl
def test_the_command_of_the_docs_is_one_that_verl_takes():
    from hydra import compose, initialize_config_module
    from verl.utils.config import omega_conf_to_dataclass

    page = (HERE.parent / "docs" / "verl.md").read_text()
    command = page.split("python -m verl.trainer.main_ppo \\\n", 1)[1].split("\n\n", 1)[0]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", command.replace("\\", "").split())
    assert omega_conf_to_dataclass(config.actor_rollout_ref.actor).capo == CAPOSettings(capo_kl_budget=5e-3)


@needs_verl
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capo": {"fisher_treshold": 1e-4}}, "actor.capo has no fisher_treshold: it has mode, granularity"),
        (
            {"capo": {"mode": "masked"}},
            "actor.capo.mode='masked' is not one of off, monitor, mask, shorten, trust_region",
        ),
        ({"capo": {"top_k": 0}}, "actor.capo.top_k=0 must be at least 1"),
        ({"capo": {"top_p": 1.5}}, "actor.capo.top_p=1.5 is a probability"),
        ({"capo": {"max_missing_mass": 2}}, "actor.capo.max_missing_mass=2 is a probability"),
        (
            {"capo": {"hessian_low": 1, "hessian_high": 0}},
            "actor.capo.hessian_low=1 and actor.capo.hessian_high=0: the l",
        ),
        ({"capo": {"fisher_threshold": 0.0}}, "actor.capo.fisher_threshold=0.0 must be above 0"),
        ({"capo": {"top_k": "many"}}, "actor.capo.top_k='many' must be a whole number"),
        ({"capo": {"kl_budget": 0}}, "actor.capo.kl_budget=0 must be above 0"),
        ({"capo": {"mode": "monitor", "kl_budget": 1e-3}}, "actor.capo.mode='monitor' must not: use actor.capo.mode="),
        (
            {"capo": {"soft": True}},
            "actor.capo.soft and actor.capo.penalty take the mask's place, and actor.capo.mode=",
        ),
        ({"capo": {"step": "sgd", "units": "translated"}}, "actor.capo.units='translated' is for the shifts of"),
        ({"capo": {"advantage": "reward"}}, "actor.capo.advantage is not for verl: algorithm.adv_estimator"),
        ({"capo": {"tokens_every": 1}}, "actor.capo.tokens_every is not for verl: only TRL's adapter records tokens"),
        ({"strategy": "veomni"}, "actor.strategy='veomni' is not FSDP"),
        ({"ulysses_sequence_parallel_size": 2}, "actor.ulysses_sequence_parallel_size=2 splits a sequence"),
        ({"use_fused_kernels": True}, "actor.use_fused_kernels=True hides the output head"),
        ({"use_prefix_grouper": True}, "actor.use_prefix_grouper=True"),
        ({"policy_loss": {"loss_mode": "gspo"}, "capo": MASK}, "actor.policy_loss.loss_mode='gspo' does not leave a"),
        ({"policy_loss": {"loss_mode": "gpg"}, "capo": MASK}, "does not say what a rejected token would have weighed"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_runs(settings, message):
    from verl.workers.config import PolicyLossConfig

    settings = dict(settings)
    if "policy_loss" in settings:
        settings["policy_loss"] = PolicyLossConfig(**settings["policy_loss"])
    with pytest.raises(ValueError, match="(?s)" + message.replace("(", r"\(")):
        actor_config(settings.pop("capo", {}), **settings)


@needs_verl
def test_another_engine_for_this_device_is_an_error(monkeypatch):
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    with pytest.raises(ValueError, match="selects verl's FSDPEngineWithLMHead here"):
        actor_config({})


@needs_verl
def test_a_loss_without_settings_is_an_error(engine):
    built, loss = engine(capo=None)
    with pytest.raises(RuntimeError, match=r"came without its settings: set actor_rollout_ref\.actor\._target_"):
        train(built, loss, [make_batch()])


# ---- it changes nothing, or the right thing --------------------------------------------------------------------------


@needs_verl
@pytest.mark.parametrize("remove_padding", [True, False])
@pytest.mark.parametrize("capo", [{"mode": "off"}, {"mode": "monitor"}, OPEN])
def test_watching_and_open_thresholds_are_verl_bit_for_bit(engine, capo, remove_padding):
    batches = [make_batch(seed) for seed in range(3)]
    runs = []
    for kind, settings in ((FSDPEngineWithLMHead, None), (CAPOEngine, capo)):
        built, loss = engine(kind, settings, remove_padding, entropy_coeff=0.0, use_kl_loss=False)
        outputs = train(built, loss, batches, remove_padding=remove_padding)
        runs.append((built, [(out["loss"], out["metrics"]["grad_norm"]) for out in outputs]))
    (plain, plain_losses), (watching, losses) = runs
    assert losses == plain_losses
    for one, other in zip(plain.gradients, watching.gradients, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(torch.equal(each, weights_of(watching)[name]) for name, each in weights_of(plain).items())
    assert bool(watching.verdicts) == (capo.get("mode") != "off")


@needs_verl
@pytest.mark.parametrize(
    "aggregation", ["token-mean", "token-sum", *("seq-mean-token-" + x for x in ("mean", "sum", "sum-norm"))]
)
def test_a_masked_step_is_verls_step_on_the_accepted_tokens(engine, aggregation):
    """The gradient equals that of verl's own engine whose response mask leaves out the rejected tokens."""
    batch = make_batch()
    masked, loss = engine(capo=OPEN | {"fisher_threshold": 0.04}, loss_agg_mode=aggregation)
    train(masked, loss, [batch], micro_batch=8)
    keep = batch["response_mask"].bool()
    keep[keep.clone()] = masked.verdicts[0][0]
    assert 0 < keep.sum() < batch["response_mask"].sum()
    assert all(keep.any(dim=1))  # else verl would still divide by that sequence's tokens
    plain, loss = engine(FSDPEngineWithLMHead, loss_agg_mode=aggregation)
    accepted = batch | {"response_mask": keep.long(), "attended": batch["response_mask"]}
    train(plain, loss, [accepted], micro_batch=8)
    for one, other in zip(masked.gradients[0], plain.gradients[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@needs_verl
@pytest.mark.parametrize("loss_mode", ["vanilla", "dppo_tv", "dppo_kl", "gpg", "cispo"])
def test_a_rejected_token_has_no_weight_in_any_maskable_loss(engine, loss_mode):
    from verl.workers.config import PolicyLossConfig

    built, loss = engine(capo=NARROW, policy_loss=PolicyLossConfig(loss_mode=loss_mode))
    assert loss_mode in MASKABLE_LOSSES
    train(built, loss, [with_old_log_probs(built, make_batch())])
    for keep, weights in zip(built.verdicts[0], built.weights[0], strict=True):
        assert not weights[~keep].any()
        assert weights[keep].all()


@needs_verl
def test_nested_and_padded_batches_are_the_same(engine):
    states = []
    for nested in (False, True):
        built, loss = engine(capo=NARROW)
        train(built, loss, [make_batch(seed) for seed in range(2)], nested=nested)
        states.append((built.verdicts, weights_of(built)))
    (verdicts, weights), (nested_verdicts, nested_weights) = states
    for step, nested_step in zip(verdicts, nested_verdicts, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(step, nested_step, strict=True))
    assert all(torch.equal(each, nested_weights[name]) for name, each in weights.items())


@needs_verl
def test_the_moments_are_the_optimizers_own(engine):
    """The head is untied and the vocabulary whole: the step model's moments are AdamW's at `lm_head`."""
    built, loss = engine(capo=NARROW | {"top_k": None}, optimizer={"clip_grad": 0.01})
    outputs = train(built, loss, [make_batch(seed) for seed in range(4)])
    assert max(out["metrics"]["grad_norm"] for out in outputs) > 0.01
    state = built.optimizer.state[built.module.lm_head.weight]
    p, q = built.planner.step.moments(torch.arange(32))
    # of the ascent, so with the other sign
    torch.testing.assert_close(-p, state["exp_avg"].full_tensor(), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(q, state["exp_avg_sq"].full_tensor(), rtol=1e-3, atol=1e-10)


@needs_verl
@pytest.mark.parametrize(
    ("how", "capo"),
    [
        ({"precision": "bf16"}, NARROW),
        ({"model": {"enable_gradient_checkpointing": True}}, NARROW),
        ({"model": {"lora_rank": 4}}, NARROW),
        ({"entropy_coeff": 0.01}, NARROW),
        ({}, OPEN | {"mode": "monitor", "fisher": "expected", "top_k": 5}),
    ],
    ids=["bf16", "checkpointing", "lora", "entropy", "expected"],
)
def test_it_trains_with(engine, how, capo):
    built, loss = engine(capo=capo, **how)
    before = weights_of(built)
    outputs = train(built, loss, [make_batch(seed) for seed in range(3)], entropy="entropy_coeff" in how)
    assert any(not torch.equal(each, before[name]) for name, each in weights_of(built).items())
    assert all(0 <= out["metrics"]["capo/rejection_rate"][0] <= 1 for out in outputs)
    assert built.planner.step.steps == 3
    assert built.planner.accepted_tokens > 0


@needs_verl
def test_a_kl_penalty_leaves_rejected_tokens_a_gradient(engine):
    built, loss = engine(capo=NARROW, use_kl_loss=True)
    train(built, loss, [make_batch(ref_log_prob=torch.full((8, 6), -3.0))])
    keep, weights = torch.cat(built.verdicts[0]), torch.cat(built.weights[0])
    assert weights[~keep].any()


@needs_verl
def test_a_step_with_every_token_rejected_is_skipped(engine):
    built, loss = engine(capo=OPEN)
    train(built, loss, [make_batch()])
    weights, moments = weights_of(built), built.planner.step.state_dict()
    built.planner.thresholds = Thresholds(fisher=0.0)
    (out,) = train(built, loss, [make_batch(1)])
    assert out["metrics"]["capo/rejection_rate"] == [1.0]
    assert out["metrics"]["capo/steps_skipped"] == [1.0]
    assert out["metrics"]["grad_norm"] == 0.0
    assert all(torch.equal(each, weights_of(built)[name]) for name, each in weights.items())
    assert all(torch.equal(each, moments[name]) for name, each in built.planner.step.state_dict().items())


@needs_verl
def test_a_gradient_that_is_not_finite_leaves_the_moments(engine):
    built, loss = engine(capo={"mode": "monitor"})
    train(built, loss, [make_batch()])
    moments = built.planner.step.state_dict()
    broken = make_batch(1)
    broken["advantages"][0] = torch.inf
    (out,) = train(built, loss, [broken])
    assert out["metrics"]["capo/nonfinite_shifts"] > [0.0]
    assert all(torch.equal(each, moments[name]) for name, each in built.planner.step.state_dict().items())


# ---- nothing goes wrong in silence -----------------------------------------------------------------------------------


@needs_verl
def test_a_head_that_is_not_called_is_an_error(engine):
    built, loss = engine(capo={})
    built.module.get_output_embeddings = lambda: torch.nn.Linear(16, 32)
    with pytest.raises(RuntimeError, match="fired 0 times in one forward pass instead of once"):
        train(built, loss, [make_batch()])


@needs_verl
def test_something_between_the_head_and_the_loss_is_an_error(engine):
    built, loss = engine(capo={})

    def sharpen(module, args, output):
        output.logits = 2 * output.logits
        return output

    built.module.register_forward_hook(sharpen)
    with pytest.raises(RuntimeError, match="something lies between the head and the loss"):
        train(built, loss, [make_batch()])


@needs_verl
def test_a_loss_that_ignores_the_advantages_is_an_error(engine):
    built, loss = engine(capo=NARROW)
    advantages = make_batch()["advantages"][:4]

    def stubborn(model_output, data, dp_group, config):
        data["advantages"] = advantages
        return ppo_loss(config, model_output, data, dp_group)

    with pytest.raises(RuntimeError, match="a rejected token still has a gradient"):
        train(built, partial(stubborn, **loss.keywords), [make_batch()])


@needs_verl
def test_several_temperatures_are_an_error(engine):
    built, loss = engine(capo={})
    with pytest.raises(ValueError, match="different temperatures"):
        train(built, loss, [make_batch()], temperature=torch.linspace(0.5, 1.0, 8))
    train(built, loss, [make_batch()], temperature=torch.full((8,), 0.9))
    with pytest.raises(ValueError, match="the temperature went from"):
        train(built, loss, [make_batch()], temperature=0.5)


@needs_verl
def test_adams_step_model_wants_adam(engine):
    built, loss = engine(capo={"step": "adam", "watch": True}, optimizer={"optimizer": "SGD"})
    with pytest.raises(ValueError, match=r"actor\.capo\.step='adam' models Adam"):
        train(built, loss, [make_batch()])
    built, loss = engine(capo={}, optimizer={"optimizer": "SGD"})  # `auto`
    train(built, loss, [make_batch()])


# ---- the same as the TRL adapter -------------------------------------------------------------------------------------


def recorded(kind):
    class Recorded(kind):
        """Notes each micro-batch's inputs, verdicts and shifts."""

        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            planned = self.planner.micro_batches[-1]
            self.seen = [*getattr(self, "seen", []), (inputs, planned.keep, planned.shifts)]
            return loss

    return Recorded


def of_trl(micro_batches):
    """The micro-batches of one optimizer step of TRL as one mini-batch of verl."""
    inputs = [each for each, _, _ in micro_batches]
    width = max(each["completion_ids"].shape[1] for each in inputs)

    def together(name):
        return torch.cat([torch.nn.functional.pad(each[name], (0, width - each[name].shape[1])) for each in inputs])

    mask = together("completion_mask")
    return {
        "prompts": torch.cat([each["prompt_ids"] for each in inputs]),
        "responses": together("completion_ids"),
        "response_mask": mask,
        "advantages": torch.cat([each["advantages"] for each in inputs])[:, None].expand(mask.shape).contiguous(),
    }


@needs_verl
@pytest.mark.parametrize(
    ("loss_type", "aggregation"),
    [("grpo", "seq-mean-token-mean"), ("dapo", "token-mean"), ("dr_grpo", "seq-mean-token-sum-norm")],
)
@pytest.mark.parametrize("remove_padding", [True, False])
def test_masks_shifts_moments_and_weights_are_those_of_the_trl_adapter(
    build, engine, loss_type, aggregation, remove_padding, record_property
):
    assert AGGREGATIONS[aggregation] == loss_type
    how = {f"capo_{name}": value for name, value in NARROW.items()}
    trainer = build(recorded(CAPOTrainer), loss_type=loss_type, temperature=0.9, max_grad_norm=0.3, **how)
    trainer.train()
    built, loss = engine(
        capo=NARROW,
        remove_padding=remove_padding,
        optimizer={"clip_grad": 0.3},
        loss_agg_mode=aggregation,
        loss_scale_factor=6,
    )
    steps = [trainer.seen[i : i + 2] for i in range(0, len(trainer.seen), 2)]
    assert len(steps) == 5
    differences = dict.fromkeys(("m_f", "m_h", "p", "q", "weights"), 0.0)
    for micro_batches in steps:
        batch = with_old_log_probs(built, of_trl(micro_batches), remove_padding=remove_padding)
        train(built, loss, [batch], remove_padding=remove_padding)
        for (_, keep, _), verdicts in zip(micro_batches, built.verdicts[-1], strict=True):
            assert torch.equal(verdicts, keep)
        for name in ("m_f", "m_h"):
            ours = torch.cat([getattr(each, name) for each in built.shifts[-1]])
            theirs = torch.cat([getattr(each, name) for _, _, each in micro_batches])
            differences[name] = max(differences[name], float((ours - theirs).abs().max() / theirs.abs().max()))
    keeps = torch.cat([keep for _, keep, _ in trainer.seen])
    assert 0.05 < (~keeps).float().mean() < 0.95
    theirs, ours = trainer.planner.step.state_dict(), built.planner.step.state_dict()
    assert torch.equal(ours["rows"], theirs["rows"])
    for name in ("p", "q"):
        differences[name] = float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max())
    weights = trainer.model.state_dict()
    differences["weights"] = max(float((each - weights[name]).abs().max()) for name, each in weights_of(built).items())
    record_property("differences", differences)
    assert max(differences[name] for name in ("m_f", "m_h", "p", "q")) < 1e-3
    assert differences["weights"] < 1e-4


@needs_verl
@pytest.mark.parametrize(
    "capo",
    [
        {"mode": "trust_region", "kl_budget": 2e-3, "kl_start": 0.1},
        {"mode": "shorten", "kl_budget": 1e-2, "kl_control": "copy"},
        {"mode": "mask", "kl_budget": 1e-2, "kl_control": "optimizer"},
        {"mode": "mask", "granularity": "sequence"},
        {"mode": "mask", "granularity": "group"},
        {"mode": "mask", "soft": True},
    ],
    ids=["trust_region", "shorten", "mask", "sequence", "group", "soft"],
)
def test_steps_are_as_long_as_those_of_the_trl_adapter(build, engine, capo, record_property):
    """Verdicts, the share, the length of each step and its KL on half of the completions, the weights after five."""
    capo = BOUNDS | {"share": True, "kl_sample": 0.5, "watch": True} | capo
    how = {f"capo_{name}": value for name, value in capo.items()}
    trainer = build(recorded(CAPOTrainer), loss_type="grpo", temperature=0.9, max_grad_norm=0.3, **how)
    trainer.train()
    built, loss = engine(capo=capo, optimizer={"clip_grad": 0.3}, loss_agg_mode="seq-mean-token-mean")
    logged = [entry for entry in trainer.state.log_history if "capo/scale" in entry]
    assert len(logged) == 5
    differences: dict[str, float] = {}
    for i, entry in enumerate(logged):
        micro_batches = trainer.seen[2 * i : 2 * i + 2]
        batch = with_old_log_probs(built, of_trl(micro_batches))
        if capo.get("granularity") == "group":
            batch["uid"] = [f"prompt {n}" for each, _, _ in micro_batches for n in each["capo_group"].tolist()]
        (out,) = train(built, loss, [batch])
        for (_, keep, _), verdicts in zip(micro_batches, built.verdicts[-1], strict=True):
            assert torch.equal(verdicts, keep)
        ours = {name: figure[0] for name, figure in out["metrics"].items() if name.startswith("capo/")}
        # those of the rollouts are not the engine's
        assert {name for name in entry if name.startswith("capo/")} - ours.keys() <= {
            "capo/completions",
            "capo/rewards_missing",
        }
        for name in LENGTHS & entry.keys():
            apart = abs(ours[name] - entry[name]) / max(abs(entry[name]), 1e-12)
            differences[name] = max(differences.get(name, 0.0), apart)
    record_property("differences", differences)
    assert {"capo/scale", "capo/learning_rate", "capo/kl/measured"} <= differences.keys()
    assert ("capo/share" in differences) == (capo["mode"] != "trust_region")
    assert max(differences.values()) < 1e-3, differences
    weights = trainer.model.state_dict()
    assert max(float((each - weights[name]).abs().max()) for name, each in weights_of(built).items()) < 1e-4


@needs_verl
@pytest.mark.parametrize("mode", ["trust_region", "mask", "shorten"])
def test_the_importance_weights_of_a_rollout_correction_are_in_the_advantages(engine, mode):
    """A batch with verl's weights w gets the verdicts, moments, length and step of one whose advantages are w A."""
    batch = make_batch(sequences=8)
    draw = torch.Generator().manual_seed(3)
    ratio = (2 * torch.rand(batch["advantages"].shape, generator=draw)).where(
        torch.rand(batch["advantages"].shape, generator=draw) > 0.3, 0
    )
    kinds = {
        "corrected": batch | {"rollout_is_weights": ratio},
        "weighed": batch | {"advantages": ratio * batch["advantages"]},
    }
    seen = {}
    for name, each in kinds.items():
        built, loss = engine(capo=NARROW | {"mode": mode, "kl_sample": 0.5, "watch": True})
        (out,) = train(built, loss, [with_old_log_probs(built, each)])
        figures = {
            key: value[0] for key, value in out["metrics"].items() if key.startswith("capo/") and "seconds" not in key
        }
        verdicts, shifts = torch.cat(built.verdicts[-1]), torch.cat([part.m_h for part in built.shifts[-1]])
        seen[name] = verdicts, shifts, built.planner.step.state_dict()["p"], figures, weights_of(built)
    ours, theirs = seen["corrected"], seen["weighed"]
    assert torch.equal(ours[0], theirs[0])
    assert mode == "trust_region" or not ours[0].all()  # whose first step is short
    torch.testing.assert_close(ours[1:3], theirs[1:3])
    assert ours[3] == pytest.approx(theirs[3], rel=1e-3, nan_ok=True)
    for name, weight in ours[4].items():
        torch.testing.assert_close(weight, theirs[4][name], rtol=1e-4, atol=1e-5)


@needs_verl
@pytest.mark.parametrize("remove_padding", [True, False])
def test_the_default_predicts_nothing_unless_it_is_asked_to_and_trains_alike(engine, remove_padding):
    """It looks at a quarter of the completions, and keeps no moments."""
    seen = []
    for watch in (False, True):
        built, loss = engine(capo={"kl_start": 0.5, "watch": watch}, remove_padding=remove_padding)
        batches = [make_batch(seed) for seed in range(3)]
        outputs = train(built, loss, batches, remove_padding=remove_padding)
        assert (built.planner is not None) == watch
        kl = [{name: figure for name, figure in out["metrics"].items() if name in LENGTHS} for out in outputs]
        seen.append((kl, weights_of(built)))
        assert ("capo/token/m_f/mean" in outputs[0]["metrics"]) == watch
    assert all({"capo/kl/measured", "capo/scale", "capo/learning_rate"} <= each.keys() for each in seen[0][0])
    assert all(
        ours == {name: theirs[name] for name in ours} for ours, theirs in zip(seen[0][0], seen[1][0], strict=True)
    )
    assert all(torch.equal(each, seen[1][1][name]) for name, each in seen[0][1].items())


@needs_verl
def test_an_update_over_the_budget_is_taken_back(engine):
    """Its KL is at most the budget, and under `copy` every step is the schedule's."""
    for control in ("learning_rate", "copy", "optimizer"):
        built, loss = engine(capo={"kl_budget": 1e-4, "kl_control": control, "kl_start": 1.0, "kl_sample": 1.0})
        outputs = [out["metrics"] for out in train(built, loss, [make_batch(seed) for seed in range(3)])]
        assert outputs[0]["capo/kl/proposed"] > [1e-4]
        assert outputs[0]["capo/kl/fraction"] < [1.0]
        assert all([0] < out["capo/kl/measured"] <= [1e-4] for out in outputs)
        assert all(out["capo/scale"] == [1.0] for out in outputs) == (control != "learning_rate")
        assert built.optimizer.param_groups[0]["lr"] == 1e-2  # the schedule's


@needs_verl
@pytest.mark.parametrize("capo", [{"mode": "trust_region"}, {"mode": "shorten", "kl_control": "copy"}])
def test_both_kinds_of_fsdp_take_the_same_steps(engine, capo):
    runs = []
    for strategy in ("fsdp2", "fsdp"):
        built, loss = engine(capo=BUDGET | BOUNDS | capo, strategy=strategy)
        outputs = train(built, loss, [make_batch(seed) for seed in range(3)])
        runs.append(([out["metrics"] for out in outputs], weights_of(built)))
    (figures, weights), (other_figures, other_weights) = runs
    for one, other in zip(figures, other_figures, strict=True):
        for name in LENGTHS & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
    for name, each in weights.items():
        torch.testing.assert_close(each, other_weights[name], rtol=1e-5, atol=1e-7)


@needs_verl
def test_kl_is_measured_with_the_random_numbers_of_the_loss(engine):
    """With dropout the KL of no step at all is rounding, and the numbers training draws are not moved."""
    losses = []
    for every in (1, 100):
        built, loss = engine(capo={"mode": "monitor", "kl_every": every}, model={"lora_rank": 4})
        for module in built.module.modules():
            if type(module).__name__ == "Dropout":
                module.p = 0.5
        for group in built.optimizer.param_groups:
            group["lr"] = 0.0
        built.lr_scheduler.step = lambda: None
        outputs = train(built, loss, [make_batch(seed) for seed in range(2)])
        losses.append([out["loss"] for out in outputs])
        if every == 1:
            assert all(out["metrics"]["capo/kl/measured"][0] < 1e-9 for out in outputs)
        else:
            assert "capo/kl/measured" not in outputs[0]["metrics"]
    assert losses[0] == losses[1]


@needs_verl
def test_a_group_wants_the_trainers_uid(engine):
    built, loss = engine(capo={"mode": "mask", "share": False, "granularity": "group"})
    with pytest.raises(ValueError, match=r"actor\.capo\.granularity='group' goes by the uid"):
        train(built, loss, [make_batch()])


# ---- checkpoints, workers --------------------------------------------------------------------------------------------


@needs_verl
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(engine, tmp_path):
    batches = [make_batch(seed) for seed in range(4)]
    through, loss = engine(capo=NARROW | BUDGET)
    train(through, loss, batches)
    first, loss = engine(capo=NARROW | BUDGET)
    train(first, loss, batches[:2])
    first.save_checkpoint(str(tmp_path / "checkpoint"), global_step=2)
    second, loss = engine(capo=NARROW | BUDGET)
    train(second, loss, [make_batch(9)])  # which the checkpoint undoes
    second.load_checkpoint(str(tmp_path / "checkpoint"), del_local_after_load=False)
    train(second, loss, batches[2:])
    assert second.region.state_dict() == through.region.state_dict()
    for name, each in through.planner.state_dict().items():
        assert torch.equal(each, second.planner.state_dict()[name])
    assert all(torch.equal(each, weights_of(second)[name]) for name, each in weights_of(through).items())


@needs_verl
def test_resuming_without_the_moments_is_an_error(engine, tmp_path):
    plain, loss = engine(capo={"mode": "off"})
    train(plain, loss, [make_batch()])
    plain.save_checkpoint(str(tmp_path / "checkpoint"), global_step=1)
    built, loss = engine(capo={})
    built.load_checkpoint(str(tmp_path / "checkpoint"), del_local_after_load=False)
    with pytest.raises(FileNotFoundError, match=r"capo_state\.safetensors"):
        train(built, loss, [make_batch(1)])


@needs_verl
@pytest.mark.parametrize("mode", ["trust_region", "mask"])
def test_moments_that_a_checkpoint_does_not_have_are_missed_by_what_decides_by_them(engine, tmp_path, caplog, mode):
    """The default keeps none; one that only watches goes on without, and says so."""
    plain, loss = engine(capo={})
    train(plain, loss, [make_batch(), make_batch(1)])
    plain.save_checkpoint(str(tmp_path / "checkpoint"), global_step=2)
    built, loss = engine(capo={"mode": mode, "watch": True})
    built.load_checkpoint(str(tmp_path / "checkpoint"), del_local_after_load=False)
    if mode == "mask":
        with pytest.raises(ValueError, match="the state of a Planner lacks"):
            train(built, loss, [make_batch(2)])
        return
    assert "has no moments of a step model" not in caplog.text
    (ours,) = train(built, loss, [make_batch(2)])
    assert "has no moments of a step model" in caplog.text
    (theirs,) = train(plain, loss, [make_batch(2)])
    assert ours["metrics"]["capo/scale"] == theirs["metrics"]["capo/scale"]
    assert all(torch.equal(each, weights_of(plain)[name]) for name, each in weights_of(built).items())


@needs_verl
def test_a_checkpoint_of_another_number_of_workers_is_refused_by_name(engine, tmp_path):
    built, loss = engine(capo={})
    train(built, loss, [make_batch()])
    built.save_checkpoint(str(tmp_path / "checkpoint"), global_step=1)
    for path in (tmp_path / "checkpoint").glob("*_world_size_1_*"):
        path.rename(path.with_name(path.name.replace("size_1", "size_2")))
    with pytest.raises(ValueError, match="was written by 2 workers, and these are 1"):
        built.load_checkpoint(str(tmp_path / "checkpoint"), del_local_after_load=False)


@needs_verl
def test_a_checkpoint_without_the_share_is_refused_where_it_is_asked_for(engine, tmp_path):
    built, loss = engine(capo=NARROW)
    train(built, loss, [make_batch()])
    built.save_checkpoint(str(tmp_path / "checkpoint"), global_step=1)
    built, loss = engine(capo=NARROW | {"share": True})
    built.load_checkpoint(str(tmp_path / "checkpoint"), del_local_after_load=False)
    with pytest.raises(ValueError, match="had no share"):
        train(built, loss, [make_batch(1)])


@needs_verl
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("workers", "strategy", "spread"),
    [(1, "fsdp2", False), (2, "fsdp2", False), (2, "fsdp2", True), (2, "fsdp", False)],
)
def test_verls_workers_on_ray_train_as_one_process_does(engine, tmp_path, workers, strategy, spread):
    """`TrainingWorker` in verl's own worker group, on this machine alone; two of them share each mini-batch."""
    from verl.workers.config import TrainingWorkerConfig

    batches = [make_batch(seed) for seed in range(3)]
    alone, loss = engine(capo=NARROW | BUDGET | {"shard_moments": spread})
    outputs = train(alone, loss, batches, micro_batch=8)  # what the workers have side by side

    settings = engine_config(strategy=strategy)
    settings.use_dynamic_bsz, settings.micro_batch_size_per_gpu = False, 8 // workers
    config = TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=str(tmp_path / "model"),
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=settings,
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, weight_decay=0.0, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    with workers_on_ray(workers, config, loss) as group:
        figures = [update(group, packed(batch, micro_batch=8 // workers)) for batch in batches]
        states = group.state()
        if strategy == "fsdp2":  # verl calls a CPU "cpu:cpu" where it saves FSDP1's weights
            group.save_checkpoint(str(tmp_path / "checkpoint"), global_step=3)

    assert [kind for kind, _, _ in states] == ["CAPOEngine"] * workers
    for out, figure in zip(outputs, figures, strict=True):
        for name in (
            *("capo/rejection_rate", "capo/token/m_f/max", "capo/batch/m_h", "capo/accepted_tokens"),
            *("capo/share", "capo/scale", "capo/kl/measured", "capo/kl/predicted"),
        ):
            assert figure[name] == pytest.approx(out["metrics"][name] * len(figure[name]), rel=1e-4), name
    moments = alone.planner.step.state_dict()
    saved = {}  # verl itself can't save under FSDP1 on CPUs
    if strategy == "fsdp2":
        saved, _ = load_state(tmp_path / "checkpoint" / STATE_FILE, torch.device("cpu"))
    for _, state, weights in states:
        assert not saved or all(torch.equal(saved[f"step.{name}"], each) for name, each in state.items())
        assert torch.equal(state["rows"], moments["rows"])
        for name in ("p", "q"):
            torch.testing.assert_close(state[name], moments[name], rtol=1e-3, atol=1e-7)
        for name, each in weights_of(alone).items():
            torch.testing.assert_close(weights[name], each, rtol=1e-3, atol=1e-5)


# ---- verl's trainer --------------------------------------------------------------------------------------------------


@needs_verl
@pytest.mark.skipif(
    importlib.util.find_spec("transfer_queue") is None, reason="verl's trainer needs verl[verl-core] (docs/verl.md)"
)
@pytest.mark.timeout(1200)
def test_verls_trainer_runs_the_recipe_and_goes_on_after_it_was_killed(tmp_path):
    """`main_ppo` from rollout to checkpoint with two workers; a server of ours stands where vLLM would."""
    settings = small_run(tmp_path, workers=2) | {
        "actor_rollout_ref.actor.capo.mode": "trust_region",
        "actor_rollout_ref.actor.optim.lr": 1e-2,
        "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": 0,
        "trainer.total_training_steps": 3,
        "trainer.save_freq": 1,
    }
    killed = run_trainer(settings, tmp_path, "killed", kill_after=2)
    whole = run_trainer(settings, tmp_path, "whole")
    steps = {row["step"]: row for row in [*killed, *whole]}
    assert [row["step"] for row in whole][-1] == len(steps) == 3
    assert len(whole) < 3  # the second goes on from the first one's checkpoint
    for row in steps.values():
        assert 0 <= row["critic/score/mean"] <= 1
        assert row["training/rollout_probs_diff_max"] < 1e-4  # the server has the weights that the last step left
        assert 0 <= row["actor/capo/kl/measured"] <= 5e-3
        assert row["actor/capo/learning_rate"] < 1e-2
    assert steps[1]["actor/capo/scale"] == 2**-10
    assert steps[3]["actor/capo/scale"] > steps[1]["actor/capo/scale"]  # what the budget's control learned was kept
    assert [step for step, row in steps.items() if "actor/capo/kl/noise" in row] == [1]
    assert (tmp_path / "checkpoints" / "global_step_3" / "actor" / "capo_state.safetensors").exists()
