"""Recorded tokens: what was written is what selection decided, training does not notice, and resuming repeats it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from capo_rl import CAPOConfig
from capo_rl.runs.tokens import Rejections, StepTokens, most_rejected, read_step, recorded_steps, write_step

# Bounds that reject some of the tiny model's tokens and keep others.
SOME = {"capo_fisher_threshold": 0.01, "capo_hessian_low": -0.2, "capo_hessian_high": 0.2}


def some_tokens(**changes) -> StepTokens:
    """Six tokens in two completions: three within the bounds, one beyond each of two, and one that is not finite."""
    about = {"step": 7, "mode": "mask", "judged": "token", "temperature": 1.0, "fisher": 0.1, "low": -1.0, "high": None}
    tokens = StepTokens(
        completion=np.array([0, 0, 0, 1, 1, 1], "i4"),
        token=np.array([3, 4, 5, 3, 4, 6], "i4"),
        advantage=np.array([1, 1, 1, -1, -1, -1], "f4"),
        m_h=np.array([0, 0, 0, -2, 0, 0], "f4"),
        m_f=np.array([0.05, 0.2, 0.1, 0.0, np.inf, 0.0], "f4"),
        log_pi=np.array([-1, -2, -3, -4, -5, -6], "f4"),
        missing_mass=np.zeros(6, "f4"),
        keep=np.array([True, False, True, False, False, True]),
        prompt=np.array([[-1, 8], [9, 8]], "i4"),
        reward=np.array([1, np.nan], "f4"),
        about=about | changes.pop("about", {}),
    )
    return replace(tokens, **changes)


def test_what_is_written_is_read(tmp_path):
    tokens = some_tokens()
    path = write_step(tmp_path, tokens)
    assert path == tmp_path / "tokens" / "step-000007.safetensors"
    assert list(path.parent.iterdir()) == [path] and recorded_steps(tmp_path) == {7: path}
    again = read_step(path)
    assert again.about == tokens.about
    for name in (
        "completion",
        "token",
        "advantage",
        "m_h",
        "m_f",
        "log_pi",
        "missing_mass",
        "keep",
        "prompt",
        "reward",
    ):
        np.testing.assert_array_equal(getattr(again, name), getattr(tokens, name), strict=True)


def test_a_token_breaks_the_bounds_that_it_breaks():
    broken = some_tokens().broken()
    assert {name: out.nonzero()[0].tolist() for name, out in broken.items()} == {
        "m_F > 0.1": [1],  # and not token 2: 0.1 in single precision is not above the bound, as in `select`
        "m_H < -1": [3],
        "not finite": [4],
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"keep": np.array([True])},
        {"keep": np.ones(6, "i4")},
        {"completion": np.array([0, 0, 0, 1, 1, 2], "i4")},
        {"token": np.array([3, 4, 5, 3, 4, -1], "i4")},
        {"reward": np.array([1.0])},
        {"about": {"fisher": "0.1"}},
        {"about": {"judged": 5}},
    ],
    ids=str,
)
def test_a_file_of_another_kind_is_refused(tmp_path, changes):
    path = write_step(tmp_path, some_tokens(**changes))
    with pytest.raises(ValueError, match=r"step-000007\.safetensors: not the tokens of a step"):
        read_step(path)


def test_a_file_cut_short_is_refused(tmp_path):
    path = write_step(tmp_path, some_tokens())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not the tokens of a step"):
        read_step(path)


def test_the_most_rejected_come_first_by_sign():
    once, twice = some_tokens(), some_tokens(token=np.array([3, 4, 5, 4, 4, 6], "i4"))
    ranked = most_rejected([once, twice])
    assert ranked == {1: [Rejections(4, 2, 2)], -1: [Rejections(4, 3, 3), Rejections(3, 1, 1)]}
    assert most_rejected([once, twice], count=1)[-1] == [Rejections(4, 3, 3)]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("settings", [{}, {"capo_mode": "monitor", "num_iterations": 2}], ids=str)
def test_recording_changes_nothing_and_tells_what_happened(build, tmp_path, settings):
    plain = build(**SOME, **settings)
    plain.train()
    assert not (tmp_path / "run" / "tokens").exists()
    trainer = build(**SOME, **settings, capo_tokens_every=2)
    trainer.train()
    expected = weights(plain)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(trainer).items())

    recorded = recorded_steps(tmp_path / "run")
    assert list(recorded) == [2, 4]
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "capo/rejection_rate" in entry}
    for step, path in recorded.items():
        tokens = read_step(path)
        assert 0 < (~tokens.keep).mean() < 1
        assert (~tokens.keep).mean() == pytest.approx(logged[step]["capo/rejection_rate"])
        assert tokens.m_f.mean() == pytest.approx(logged[step]["capo/token/m_f/mean"])
        assert len(tokens.reward) == 8 and set(tokens.completion) == set(range(8))
        outside = np.any(list(tokens.broken().values()), axis=0)
        assert tokens.about["judged"] == "token" and (outside == ~tokens.keep).all()
        # a prompt of three words and its completion, whose tokens are all there and in their order
        words = trainer.processing_class.batch_decode([row[row >= 0] for row in tokens.prompt])
        assert all(len(text.split()) == 3 for text in words)
        for number, reward in enumerate(tokens.reward):
            ids = tokens.token[tokens.completion == number]
            even = [int(word[1:]) % 2 == 0 for word in trainer.processing_class.decode(ids).split() if word[0] == "w"]
            assert reward == pytest.approx(sum(even) / len(even) if even else 0.0)


def test_resuming_writes_the_same_records_and_no_others(build, tmp_path):
    settings = SOME | {"capo_tokens_every": 1, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    settings |= {"num_iterations": 2}  # so that a checkpoint is taken in the middle of a rollout's use
    run = tmp_path / "run"
    build(**settings).train()
    whole = {step: path.read_bytes() for step, path in recorded_steps(run).items()}
    assert list(whole) == [1, 2, 3, 4]
    write_step(run, some_tokens())  # step 7, of a run that went on for longer
    (run / "tokens" / "step-000004.tmp").write_bytes(b"half a file")
    build(**settings).train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert {step: path.read_bytes() for step, path in recorded_steps(run).items()} == whole
    assert not list((run / "tokens").glob("*.tmp"))


def test_recording_may_begin_in_the_middle_of_a_rollout_s_use(build, tmp_path):
    settings = SOME | {"max_steps": 3, "num_iterations": 3, "save_strategy": "steps", "save_steps": 1}
    run = tmp_path / "run"
    build(**settings).train()
    build(**settings, capo_tokens_every=1).train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert [np.isnan(read_step(path).reward).all() for path in recorded_steps(run).values()] == [True, True]


def test_settings_that_record_nothing_are_refused(tmp_path):
    settings = {"output_dir": str(tmp_path), "report_to": "none", "bf16": False, "use_cpu": True}
    with pytest.raises(ValueError, match="capo_tokens_every=0 must be at least 1"):
        CAPOConfig(**settings, capo_tokens_every=0)
    with pytest.raises(ValueError, match="capo_mode='off' looks at none: use capo_mode='monitor'"):
        CAPOConfig(**settings, capo_tokens_every=5, capo_mode="off")
