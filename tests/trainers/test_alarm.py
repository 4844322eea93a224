"""The alarm: its rule on series of numbers, and each of its actions in runs of both trainers."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import GRPOConfig, GRPOTrainer

import warm
from capo_rl import MonitorCallback
from capo_rl.trainers.alarm import Alarm, AlarmCallback, Watch, scale_learning_rate
from conftest import ROOT

X = {"x": 0.0}
# Any rise over the last two observations raises an alarm, once.
ALWAYS = {"factor": 1 + 1e-12, "window": 2, "warmup": 1, "patience": 1, "cooldown": 100}


def raised(alarm: Alarm, series, watch: Watch | None = None) -> list[int]:
    """The observations that raise an alarm."""
    watch = watch or Watch(alarm)
    readings = [watch.update({"x": x} if not isinstance(x, dict) else x) for x in series]
    return [t for t, reading in enumerate(readings) if reading is not None and reading[0]]


alarms = st.builds(
    lambda factor, window, patience, warmup, cooldown, floor: Alarm(
        {"x": floor}, factor=factor, window=window, patience=min(patience, window // 2), warmup=min(warmup, window),
        cooldown=cooldown,
    ),
    st.sampled_from([1.1, 2.0, 10.0]),
    st.integers(2, 12),
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(0, 8),
    st.sampled_from([0.0, 0.5, 4.0]),
)  # fmt: skip
figures = st.floats(1e-6, 1e6)
series = st.lists(st.one_of(figures, st.none(), st.just(math.nan)), max_size=60)


# ---- the rule ------------------------------------------------------------------------------------------------------


@given(alarms, figures)
def test_a_constant_series_never_raises_an_alarm(alarm, x):
    assert raised(alarm, [x] * 40) == []


@given(alarms, st.lists(figures, max_size=60))
def test_a_falling_series_never_raises_an_alarm(alarm, values):
    assert raised(alarm, sorted(values, reverse=True)) == []


@pytest.mark.parametrize(("patience", "at"), [(1, 20), (2, 21), (5, 24)])
def test_the_alarm_comes_with_the_last_observation_of_its_patience(patience, at):
    alarm = Alarm(X, factor=3.0, window=10, patience=patience, cooldown=100)
    assert raised(alarm, [1.0] * 20 + [3.1] * 10) == [at]
    assert raised(alarm, [1.0] * 20 + [3.0] * 10) == []


def test_one_observation_at_the_baseline_starts_the_patience_again():
    alarm = Alarm(X, factor=3.0, window=10, patience=3, cooldown=100)
    assert raised(alarm, [1.0] * 20 + [9.0, 9.0, 1.0, 9.0, 9.0, 9.0]) == [25]


def test_an_outlier_does_not_move_the_baseline():
    alarm = Alarm(X, factor=3.0, window=10, patience=2, cooldown=0)
    assert raised(alarm, [1.0] * 10 + [1e9] + [1.0] * 5 + [4.0, 4.0]) == [17]


def test_a_rise_below_the_floor_is_none():
    alarm = Alarm({"x": 1.0}, factor=3.0, window=10, patience=1)
    assert raised(alarm, [1e-6] * 20 + [2.9] * 5) == []
    assert raised(alarm, [1e-6] * 20 + [3.1]) == [20]


def test_no_alarm_before_the_warm_up_and_none_in_the_cool_down():
    alarm = Alarm(X, factor=2.0, window=4, patience=1, warmup=3, cooldown=5)
    rising = [10.0**t for t in range(16)]
    assert raised(alarm, rising) == [3, 9, 15]


@given(alarms, series, st.integers(-30, 30))
def test_the_scale_does_not_matter(alarm, values, power):
    """Powers of two, which multiply without rounding."""
    scale = 2.0**power
    scaled = Alarm(**{**vars(alarm), "signals": {"x": alarm.signals["x"] * scale}})
    assert raised(alarm, values) == raised(scaled, [x if x is None else x * scale for x in values])


@given(alarms, series)
def test_a_missing_figure_is_no_observation(alarm, values):
    """NaN, None, zero and a step without the figure leave everything as it was; infinity is an observation."""
    watch, other = Watch(alarm), Watch(alarm)
    for x in values:
        if x is None or math.isnan(x):
            before = watch.state_dict()
            for nothing in ({"x": x}, {}, {"x": 0.0}, {"x": -1.0}, {"y": 1.0}):
                assert watch.update(nothing) is None
            assert watch.state_dict() == before
        else:
            assert watch.update({"x": x}) == other.update({"x": x})
    assert raised(Alarm(X, patience=1), [1.0] * 10 + [math.inf]) == [10]


@given(alarms, series, st.integers(0, 60))
def test_going_on_from_a_saved_state_changes_nothing(alarm, values, stop):
    watch = Watch(alarm)
    before = raised(alarm, values[:stop], watch)
    resumed = Watch(alarm)
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    after = raised(alarm, values[stop:], resumed)
    assert before + [t + min(stop, len(values)) for t in after] == raised(alarm, values)


def test_all_signals_or_any_of_them():
    both = {"x": 0.0, "y": 0.0}
    settings = {"factor": 2.0, "window": 10, "patience": 2, "cooldown": 100}
    steps = [{"x": 1.0, "y": 1.0}] * 10 + [{"x": 9.0, "y": 1.0}] * 3 + [{"x": 9.0, "y": 9.0}] * 3
    assert raised(Alarm(both, "any", **settings), steps) == [11]
    assert raised(Alarm(both, "all", **settings), steps) == [14]
    # y is measured at every other step only
    sparse = [step if t % 2 else {"x": step["x"]} for t, step in enumerate(steps + steps[-1:] * 4)]
    assert raised(Alarm(both, "all", **(settings | {"window": 20, "warmup": 5})), sparse) == [15]
    watch = Watch(Alarm(both, "all", **settings))
    assert [watch.update(step) for step in steps][10] == (False, 1.0)  # the ratio that decides


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"signals": ("x",)}, "with their floors"),
        ({"signals": {}}, "with their floors"),
        ({"signals": {"x": -1.0}}, "with their floors"),
        ({"combine": "most"}, "combine='most'"),
        ({"factor": 1.0}, "factor=1.0"),
        ({"warmup": 11}, "warmup=11"),
        ({"patience": 6}, "patience=6"),
        ({"cooldown": -1}, "cooldown=-1"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Alarm(**settings)


def test_actions_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="pray is not one of warn"):
        AlarmCallback(actions=("pray",))
    with pytest.raises(ValueError, match=r"lr_scale=2\.0"):
        AlarmCallback(lr_scale=2.0)


def test_the_default_is_what_won_on_the_tuning_runs():
    measured = json.loads(ROOT.joinpath("results/alarm/alarm.json").read_text())
    rows = measured["at_most_false_per_1000"]["1"].values()
    best = max(rows, key=lambda row: row["tuning"]["in_time"])
    assert Alarm() == Alarm(**best["alarm"])


# ---- the callback --------------------------------------------------------------------------------------------------


class Reporter(TrainerCallback):
    """Keeps what a logging integration would send."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


def with_alarm(build, *args, signals=None, rule=ALWAYS, actions=(), lr_scale=0.2, **settings):
    trainer = build(*args, **settings)
    AlarmCallback(Alarm(signals or {"learning_rate": 0.0}, **rule), actions, lr_scale=lr_scale).attach(trainer)
    return trainer


# The learning rate is a figure that every trainer logs, and rises in a warm-up: an alarm at step 3, exactly.
RISING = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4, "max_steps": 6}


@pytest.mark.parametrize("stock", [False, True])
def test_figures_reach_reporters_and_history_and_nothing_else_changes(build, stock, caplog):
    classes = (GRPOTrainer, GRPOConfig) if stock else ()
    plain = build(*classes, **RISING)
    plain.train()
    reporter = Reporter()
    watched = with_alarm(build, *classes, actions=("warn",), callbacks=[reporter], **RISING)
    assert watched.callback_handler.callbacks.index(reporter) > 0
    with caplog.at_level(logging.WARNING, logger="capo_rl.trainers.alarm"):
        watched.train()
    assert [record.message for record in caplog.records if record.name == "capo_rl.trainers.alarm"] == [
        "step 3: alarm, learning_rate at 2 times the baseline (warn)"
    ]
    sent = [
        (step, logs["capo/alarm"], logs["capo/alarm/ratio"]) for step, logs in reporter.seen if "capo/alarm" in logs
    ]
    assert sent == [
        (3, 1.0, 2.0),
        *((step, 0.0, pytest.approx(ratio)) for step, ratio in ((4, 2), (5, 1.6), (6, 8 / 7))),
    ]
    kept = [entry for entry in watched.state.log_history if "capo/alarm" in entry]
    assert [(entry["step"], entry["capo/alarm"], entry["capo/alarm/ratio"]) for entry in kept] == sent
    for name, weight in plain.model.named_parameters():
        assert torch.equal(weight, watched.model.get_parameter(name)), name


@pytest.mark.parametrize("signal", ["grad_norm", "entropy", "reward"])
def test_a_stock_trainer_is_watched_by_what_it_logs_itself(build, signal):
    trainer = with_alarm(build, GRPOTrainer, GRPOConfig, signals={signal: 0.0})
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    values = [entry[signal] for entry in entries]
    watch = Watch(Alarm({signal: 0.0}, **ALWAYS))
    expected = [watch.update({signal: value}) for value in values]
    assert [(entry.get("capo/alarm"), entry.get("capo/alarm/ratio")) for entry in entries] == [
        (None, None) if reading is None else (float(reading[0]), reading[1]) for reading in expected
    ]
    assert sum(reading is not None for reading in expected) == len(values) - 1


@pytest.mark.parametrize("signal", ["capo/kl/measured", "capo/batch/m_f", "capo/token/m_f/q99"])
def test_a_monitored_run_is_watched_by_capo_s_figures(build, signal):
    trainer = with_alarm(build, signals={signal: 0.0}, capo_mode="monitor")
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [("capo/alarm" in entry) for entry in entries] == [False, True, True, True, True]


def test_a_stock_trainer_with_a_monitor_is_watched_by_capo_s_figures(build):
    trainer = with_alarm(build, GRPOTrainer, GRPOConfig, signals={"capo/kl/measured": 0.0})
    trainer.add_callback(MonitorCallback(trainer))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [("capo/alarm" in entry) for entry in entries] == [False, True, True, True, True]


def test_added_as_any_callback_it_acts_and_its_figures_reach_the_history(build):
    trainer = build(**RISING)
    trainer.add_callback(AlarmCallback(Alarm({"learning_rate": 0.0}, **ALWAYS), ("stop",)))
    trainer.train()
    assert trainer.state.global_step == 3
    assert [entry["capo/alarm"] for entry in trainer.state.log_history if "capo/alarm" in entry] == [1.0]


def test_stop_ends_the_run_after_the_step_of_the_alarm(build):
    trainer = with_alarm(build, actions=("stop",), **RISING)
    trainer.train()
    assert trainer.state.global_step == 3


def test_checkpoint_saves_one_at_the_step_of_the_alarm(build, tmp_path):
    with_alarm(build, actions=("checkpoint",), **RISING).train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize("scheduler", ["constant_with_warmup", "linear", "cosine"])
def test_lower_lr_holds_for_every_later_step_and_for_the_planned_one(build, scheduler):
    settings = RISING | {"lr_scheduler_type": scheduler, "capo_mode": "monitor"}
    rates, planned = [], []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates[-1].append(optimizer.param_groups[0]["lr"])
            planned[-1].append(trainer.planner.step.lr)

    for actions in ((), ("lower_lr",)):
        trainer = with_alarm(build, actions=actions, lr_scale=0.25, **settings)
        trainer.add_callback(Rates())
        rates.append([])
        planned.append([])
        trainer.train()
    assert rates[1] == pytest.approx(rates[0][:3] + [rate / 4 for rate in rates[0][3:]])
    assert planned == rates
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(rates[1])


@pytest.mark.parametrize("stopped_at", [3, 4, 5])
@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_has_the_alarms_and_the_learning_rate_of_one_that_did_not_stop(
    build, tmp_path, stopped_at, restore
):
    """Stopped in the patience, at the alarm, and in the cool-down; also where the trainer rebuilds its callbacks."""
    rule = ALWAYS | {"window": 4, "patience": 2, "cooldown": 1}
    settings = RISING | {
        "warmup_steps": 8,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 1,
        "restore_callback_states_from_checkpoint": restore,
        "actions": ("lower_lr",),
        "lr_scale": 0.9,
        "rule": rule,
    }

    def end(trainer):
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        return [
            (entry.get("capo/alarm"), entry.get("capo/alarm/ratio"), entry["learning_rate"]) for entry in entries
        ], trainer.model.lm_head.weight.detach()

    whole = with_alarm(build, **settings)
    whole.train()
    expected, weight = end(whole)
    assert [alarm for alarm, _, _ in expected] == [None, None, 0, 1, 0, 1, 0, 1]
    resumed = with_alarm(build, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stopped_at}"))
    actual, its_weight = end(resumed)
    assert actual == expected
    assert torch.equal(its_weight, weight)


def test_a_checkpoint_from_before_there_was_an_alarm_can_be_gone_on_from(build, tmp_path):
    settings = RISING | {"save_strategy": "steps", "save_steps": 1}
    build(**(settings | {"max_steps": 2})).train()
    trainer = with_alarm(build, actions=("stop",), **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert trainer.state.global_step == 4


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 4),
                torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t),
            ],
            [4],
        ),
    ],
    ids=["step", "cosine annealing", "sequential"],
)
def test_the_learning_rate_of_other_schedulers_is_scaled_too(schedule):
    def rates(scale_at):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = schedule(optimizer)
        found = []
        for t in range(8):
            optimizer.step()
            scheduler.step()
            if t == scale_at:
                scale_learning_rate(optimizer, scheduler, 0.5)
                assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]
            found.append(optimizer.param_groups[0]["lr"])
        return found

    plain, scaled = rates(None), rates(2)
    assert scaled == pytest.approx(plain[:2] + [rate / 2 for rate in plain[2:]])


def _logs_of_its_own(rank: int, folder: str, port: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    PartialState(cpu=True)
    callback = AlarmCallback(Alarm({"capo/batch/m_f": 0.0}, **ALWAYS), ("stop",))
    state, control = TrainerState(), TrainerControl()
    callback.on_train_begin(None, state, control)
    series = ([1.0, 1.0, 1.0], [1.0, 9.0, 9.0])[rank]  # the other process alone would raise an alarm
    logs = [{"capo/batch/m_f": x} for x in series]
    for each in logs:
        callback.on_log(None, state, control, logs=each)
    Path(folder, f"{rank}.json").write_text(json.dumps([control.should_training_stop, logs]))
    torch.distributed.barrier()
    os._exit(0)  # an interpreter that takes its objects down may abort in gloo's threads; what is tested is over


def test_all_processes_act_on_the_figures_of_the_first(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.start_processes(_logs_of_its_own, (str(tmp_path), port), nprocs=2, start_method=warm.METHOD)
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one[0] is other[0] is False
    assert [each.get("capo/alarm/ratio") for each in one[1]] == [each.get("capo/alarm/ratio") for each in other[1]]
    assert one[1] != other[1]
