"""docs/refusals.md: each message it lists is raised by what it says, or stands in the source word for word."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from test_planner import TOLD
from test_trust_region import REFUSED
from transformers import LlamaForCausalLM, Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOTrainer

from capo_rl import CAPOConfig, CAPOTrainer, MonitorCallback
from capo_rl.curvature.step import AdamStep
from capo_rl.runs.models import check_head, locate
from capo_rl.settings.recipe import read_recipe
from conftest import ROOT, make_model, wants_even_words

LISTED = re.findall(r"^\| `(.+?)` \|", (ROOT / "docs" / "refusals.md").read_text(), re.MULTILINE)
SOME = {"capo_fisher_threshold": 0.01, "capo_hessian_low": -0.2, "capo_hessian_high": 0.2}
BUDGET = {"capo_kl_budget": 1e-3}


def no_head(build, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    check_head(make_model(), "this")


def softcapped(build, tmp_path, monkeypatch):
    model = make_model()
    model.config.final_logit_softcapping = 30.0
    build(model=model)


def pickles(build, tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").touch()
    locate(str(tmp_path))


def unseen_backbone(build, tmp_path, monkeypatch):
    trainer = build(**SOME)
    trainer.model.base_model.register_forward_hook = torch.nn.Identity().register_forward_hook
    trainer.train()


def something_between(build, tmp_path, monkeypatch):
    trainer = build(**SOME)
    head = trainer.backbone.head
    trainer.backbone.head = lambda model: replace(head(model), scale=2.0)
    trainer.train()


def loss_of_its_own(build, tmp_path, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs: model.lm_head.weight.sum())
    build(**SOME).train()


def deaf_loss(build, tmp_path, monkeypatch):
    trainer = build(**SOME)
    trainer._select = lambda model, inputs, *rest: CAPOTrainer._select(trainer, model, dict(inputs), *rest)
    trainer.train()


def detached_loss(build, tmp_path, monkeypatch):
    trainer = build(**SOME)
    trainer._select = lambda *args: CAPOTrainer._select(trainer, *args[:-1], args[-1].detach().requires_grad_())
    trainer.train()


def with_optimizer(**settings):
    def refuse(build, tmp_path, monkeypatch):
        model = make_model()
        made = (torch.optim.AdamW if settings else torch.optim.SGD)(model.parameters(), lr=0.1, **settings)
        build(model=model, optimizers=(made, None), capo_kl_control="optimizer", **BUDGET)

    return refuse


def under_deepspeed(**settings):
    def refuse(build, tmp_path, monkeypatch):
        trainer = build(**settings)
        trainer.is_deepspeed_enabled = True
        trainer.prepare_selection()

    return refuse


def foreign_checkpoint(build, tmp_path, monkeypatch):
    build(GRPOTrainer, GRPOConfig, max_steps=1, save_strategy="steps", save_steps=1).train()
    build().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def monitor(trainer=GRPOTrainer, config=GRPOConfig, **settings):
    return lambda build, *_: MonitorCallback(build(trainer, config), **settings)


def taken_column(build, tmp_path, monkeypatch):
    data = Dataset.from_list([{"prompt": "w1", "completions": "w2"}])
    CAPOTrainer("./no-such-model", wants_even_words, train_dataset=data, args=CAPOConfig(str(tmp_path), use_cpu=True))


def setting(**settings):
    return lambda build, *_: build(**settings)


def recipe(lines):
    def refuse(build, tmp_path, monkeypatch):
        (tmp_path / "r.yaml").write_text(f"use_cpu: true\nbf16: false\n{lines}\n")
        read_recipe(str(tmp_path / "r.yaml"))

    return refuse


def loss_by_sequence(build, tmp_path, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", GMPOTrainer._compute_loss)
    wide = dict.fromkeys(("capo_fisher_threshold", "capo_hessian_low", "capo_hessian_high"))
    build(max_completion_length=4, **wide).train()


def loss_around(build, tmp_path, monkeypatch):
    own = {"_compute_loss": lambda self, model, inputs: GRPOTrainer._compute_loss(self, model, inputs)}
    build(type("Around", (CAPOTrainer,), own), **SOME).train()


def optimizer_of_its_own(build, tmp_path, monkeypatch):
    def make(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return self.optimizer

    build(type("Mine", (CAPOTrainer,), {"create_optimizer": make}), **SOME).train()


RAISED = {
    "has no output embedding": no_head,
    "final_logit_softcapping is not supported": softcapped,
    "no such folder; check the path, or give a hub id": lambda *_: locate("./no-such-model"),
    "these are pickles, which can run code": pickles,
    "runs foreign code": setting(trust_remote_code=True),
    "fired 0 times in one forward pass": unseen_backbone,
    "that CAPO does not model": something_between,
    "has no denominators for loss_type=": setting(loss_type="vespo"),
    "can't leave a token out of a loss with importance_sampling_level='sequence'": setting(
        importance_sampling_level="sequence"
    ),
    "the loss never asked for its log-probabilities": loss_of_its_own,
    "the loss did not read the advantages CAPO wrote": deaf_loss,
    "never reached the log-probabilities CAPO watched": detached_loss,
    "CAPOTrainer takes a CAPOConfig": lambda build, *_: build(config=GRPOConfig),
    "the data has a column": taken_column,
    "is not one of": setting(capo_mode="on"),
    "gives each token its own advantage, and the loss is": lambda build, *_: build(
        type("Both", (CAPOTrainer, GMPOTrainer), {})
    ),
    "is not that of its own advantage": loss_by_sequence,
    "loss went around CAPOTrainer's": loss_around,
    "capo_step='auto' knows the steps of": setting(optim="adafactor"),
    "by which capo_step='auto' chose": optimizer_of_its_own,
    "multiplies the step by a share that is Adam's": setting(capo_mode="shorten", optim="sgd"),
    "so this rejects every token": setting(capo_fisher_threshold=0.0),
    "must be a number, and this is text": setting(capo_fisher_threshold="1e-4"),
    "take the mask's place, and": setting(capo_mode="shorten", capo_soft=True),
    "is for several processes, and this is one": setting(ddp_backend="gloo"),
    "would be ignored": recipe("load_in_4bit: true"),
    "says nothing without": recipe("lora_r: 4"),
    "stands twice": recipe("seed: 1\nseed: 2"),
    "the lower bound is above the upper": setting(capo_hessian_low=1.0, capo_hessian_high=-1.0),
    "is NaN: give a number": setting(capo_fisher_threshold=math.nan),
    "must be at least 1, or null for the whole vocabulary": setting(capo_top_k=0),
    "is a probability: give it in (0, 1], or null": setting(capo_top_p=0.0),
    "is a probability: give it in [0, 1]": setting(capo_max_missing_mass=2.0),
    "must be at least 1, or null for the steps that are logged": setting(capo_kl_every=0),
    "is a share of the completions: give it in (0, 1]": setting(capo_kl_sample=0.0),
    "is a share of the learning rate: give it in (0, 1]": setting(capo_kl_start=0.0),
    "must be at least 1, or null for never": setting(capo_tokens_every=0),
    "looks at none": setting(capo_tokens_every=1, capo_mode="off"),
    "computes none by itself": setting(capo_tokens_every=1, capo_mode="trust_region"),
    "both take the mask's place": setting(capo_soft=True, capo_penalty=1.0),
    "is for the shifts of single tokens under Adam": setting(capo_units="translated", capo_granularity="group"),
    "weigh tokens one by one": setting(capo_soft=True, capo_granularity="sequence"),
    "must be above 0, or null for no budget": setting(capo_kl_budget=0.0),
    "capo_kl_budget changes the run": setting(capo_mode="monitor", **BUDGET),
    "recomputes the step of torch's AdamW": setting(optim="sgd", capo_kl_control="optimizer", **BUDGET),
    "recomputes Adam's step, and the optimizer is": with_optimizer(),
    "does not know amsgrad's step": with_optimizer(amsgrad=True),
    "would change the run, and MonitorCallback only watches it": monitor(capo_mode="mask"),
    "not a setting of CAPO's": monitor(capo_hope=1),
    "which watches itself": lambda build, *_: MonitorCallback(build()),
    "which is what MonitorCallback adds to a trainer": monitor(type("Named", (GRPOTrainer,), {"planner": None})),
    "MonitorCallback watches trl.GRPOTrainer": lambda *_: MonitorCallback(Trainer.__new__(Trainer)),
    "moves weights of a step that DeepSpeed": under_deepspeed(capo_kl_budget=1e-3, capo_kl_control="copy"),
    "shortens a step that DeepSpeed has taken already": under_deepspeed(capo_mode="shorten"),
    "is not a checkpoint of CAPOTrainer": foreign_checkpoint,
    "the run used another step model": lambda *_: AdamStep(1e-3).load_state_dict({"steps": torch.tensor(1)}),
}
# In a loop of one's own.
RAISED |= {message: lambda *given, call=call: call(given[-1]) for message, call in (TOLD | REFUSED).items()}
# These take an engine that is not installed everywhere.
WRITTEN = {
    "which CAPO can't work with",
    "the loss came without its settings",
    "is not for verl",
    "does not say what a rejected token would have weighed",
    "keeps the scales of weights that a KL budget may take back",
    "goes by the uid",
    "workers, and these are",
}


def test_every_message_of_the_page_is_tried():
    assert len(LISTED) == len(set(LISTED))
    assert set(LISTED) == RAISED.keys() | WRITTEN


@pytest.mark.parametrize("message", RAISED)
def test_is_raised(build, tmp_path, monkeypatch, message):
    with pytest.raises((ValueError, TypeError, RuntimeError, FileNotFoundError), match=re.escape(message)):
        RAISED[message](build, tmp_path, monkeypatch)


@pytest.mark.parametrize("message", sorted(WRITTEN))
def test_stands_in_the_source(message):
    source = "".join(path.read_text() for path in (ROOT / "src" / "capo_rl").rglob("*.py"))
    assert message in re.sub(r'"\s*f?"', "", source)
