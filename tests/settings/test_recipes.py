"""Every recipe is read into the configs its trainer takes, and the paper's are those of its tables."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from capo_rl.cli import main
from capo_rl.settings.config import CAPOConfig
from capo_rl.settings.recipe import RecipeError, read_recipe, settings
from capo_rl.settings.recipe_file import first_look
from capo_rl.settings.train_help import GROUPS, train_help
from conftest import ROOT

RECIPES = ROOT / "recipes"
PAPER = RECIPES / "qwen2.5_math_7b"
QUICKSTART = str(RECIPES / "quickstart.yaml")
# No GPU where this is tested: bf16 and vLLM are asked for by the recipe and refused by the machine, not by the config.
HERE = ["--use_cpu", "true", "--bf16", "false"]


# `capo train` reads all but those for the engines it runs on.
OURS = [path for path in sorted(RECIPES.rglob("*.yaml")) if path.parent.name not in ("accelerate", "verl")]


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_every_recipe_is_read(path):
    recipe = read_recipe(str(path), HERE)
    assert recipe.model.model_name_or_path and recipe.data.dataset_name
    assert Path(recipe.training.output_dir).parts[0] == "runs"
    assert recipe.training.per_device_train_batch_size % recipe.training.num_generations == 0


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_recipes(path):
    config = load_config_from_file(str(path))
    assert config.num_processes > 1
    assert {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(path.stem, "DEEPSPEED") == config.distributed_type.value
    if path.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


# Tables 2 to 4 as they stand in the paper, on 4 GPUs.
TABLE_2 = {
    "max_completion_length": 1024,
    "num_generations": 8,
    "temperature": 0.9,
    "max_steps": 100,
    "warmup_steps": 0.1,
    "num_iterations": 1,
    "lr_scheduler_type": "cosine",
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "beta": 0.0,
}
TABLE_3 = {"standard": (3e-6, 1152), "aggressive": (1.5e-5, 96)}
TABLE_4 = {"capo": (1e-2, 1e-4), "dr_capo": (5e-4, 1e-3), "reincapo": (1e-1, 1e-5)}
METHODS = {
    "grpo": ("grpo", "group", "group"),
    "dr_grpo": ("dr_grpo", "none", "group"),
    "reinforce": ("dr_grpo", "none", "reward"),
}
BASE = {"capo": "grpo", "dr_capo": "dr_grpo", "reincapo": "reinforce"}
RUNS = ["grpo_standard", *(f"{name}_aggressive" for name in (*METHODS, *BASE))]


@pytest.mark.parametrize("run", RUNS)
def test_the_papers_recipes_have_its_tables(run):
    name, regime = run.rsplit("_", 1)
    recipe = read_recipe(str(PAPER / f"{run}.yaml"), HERE)
    training = recipe.training
    for field, value in TABLE_2.items():
        assert getattr(training, field) == value, field
    assert recipe.data.max_prompt_length == 512
    learning_rate, batch = TABLE_3[regime]
    assert training.learning_rate == learning_rate
    assert 4 * training.per_device_train_batch_size * training.gradient_accumulation_steps == batch
    method = (training.loss_type, training.scale_rewards, training.capo_advantage)
    assert method == METHODS[BASE.get(name, name)]
    assert (training.capo_step, training.capo_granularity, training.capo_top_k) == ("adam", "token", 50)
    if name in TABLE_4:
        hessian, fisher = TABLE_4[name]
        assert training.capo_mode == "mask"
        assert not training.capo_share
        assert training.kl_budget is None
        assert training.thresholds.fisher == fisher
        assert training.thresholds.hessian == (-hessian, hessian)
    else:
        assert training.capo_mode == "monitor"
    assert recipe.model.model_name_or_path == "Qwen/Qwen2.5-Math-7B"
    assert training.output_dir == f"runs/qwen2.5_math_7b/{run}"


def test_all_of_the_papers_recipes_are_checked():
    assert sorted(path.stem for path in PAPER.glob("*.yaml")) == sorted(RUNS)


def test_the_command_line_overrides_any_field():
    recipe = read_recipe(
        QUICKSTART,
        ["--learning_rate", "1e-3", "--capo_fisher_threshold=inf", "--dataset_limit=7", "--use_peft=1", "--lora_r=4"],
    )
    assert recipe.training.learning_rate == 1e-3
    assert recipe.training.thresholds.fisher == math.inf
    assert (recipe.data.dataset_limit, recipe.model.lora_r) == (7, 4)


def test_yaml_off_is_off(tmp_path):
    (tmp_path / "r.yaml").write_text(Path(QUICKSTART).read_text().replace("capo_mode: trust_region", "capo_mode: off"))
    assert read_recipe(str(tmp_path / "r.yaml"), []).training.capo_mode == "off"


def test_settings_are_what_differs_from_the_defaults():
    one = settings(read_recipe(QUICKSTART))
    two = settings(read_recipe(QUICKSTART, ["--seed", "3"]))
    assert {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)} == {"seed"}
    assert one["model_name_or_path"] == "embedded"
    assert "adam_beta1" not in one


def test_settings_have_no_secrets():
    recipe = read_recipe(QUICKSTART)
    recipe.data.dataset_name = "https://me:s3cr3t@example.org/a?api_key=s3cr3t"
    recipe.training.model_init_kwargs = {"token": "s3cr3t"}
    asked = settings(recipe)
    assert asked["dataset_name"] == "https://(not shown)@example.org/a?(not shown)"
    assert asked["model_init_kwargs"] == {"token": "(not shown)"}


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        ("capo_fisher_treshold: 1e-4", [], "no field `capo_fisher_treshold`; did you mean `capo_fisher_threshold`"),
        ("xyzzyx: 1", [], "no field `xyzzyx`; `capo train RECIPE --help-all` lists all"),
        ("", ["--learning-rat", "1"], "on the command line: there is no field `learning-rat`; did you mean"),
        ("capo_fisher_threshold: -1.0", [], "capo_fisher_threshold=-1.0 must be above 0, or null"),
        ("capo_hessian_low: 1.0\ncapo_hessian_high: -1.0", [], "the lower bound is above the upper; swap them"),
        ("num_generations: 7", [], r"generation_batch_size \(16\) must be divisible by num_generations \(7\)"),
        ("model_name_or_path: null", [], "model_name_or_path is missing"),
        ("dataset_name: null", [], "dataset_name is missing"),
    ],
)
def test_bad_fields_are_named(tmp_path, change, overrides, message):
    recipe = tmp_path / "r.yaml"
    replaced = {line.split(":")[0] for line in change.splitlines()}
    kept = [line for line in Path(QUICKSTART).read_text().splitlines() if line.split(":")[0] not in replaced]
    recipe.write_text("\n".join([*kept, change]))
    with pytest.raises(RecipeError, match=message):
        read_recipe(str(recipe), overrides)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b", "a YAML list; write one `field: value` a line"),
        ("", "empty; write one `field: value` a line"),
        ("a: 1\nb: 2\na: 3", "`a` stands twice, in lines 1 and 3"),
        ("a: [", "not YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(RecipeError, match=message):
        read_recipe(str(tmp_path / "r.yaml"))


def test_a_missing_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match=r"no such file; did you mean .*quickstart\.yaml\?"):
        read_recipe(str(RECIPES / "quikstart.yaml"))
    with pytest.raises(RecipeError, match="no such file; give the path of a YAML file"):
        read_recipe("nowhere/zzz.yaml")


# ---- the command -------------------------------------------------------------------------------------------------


def capo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "capo_rl.cli", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["--version"], ["train", "--help"], ["train", QUICKSTART, "--help"], ["train", QUICKSTART, "-h"]),
        *([command, "--help"] for command in ("calibrate", "bench", "eval", "report", "explain", "recipes", "doctor")),
    ],
)
def test_help_waits_for_nothing_heavy(arguments):
    code = (
        f"import sys; from capo_rl.cli import main; sys.argv[1:] = {arguments}\ntry: main()\nexcept SystemExit: pass\n"
    )
    check = "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'trl', 'numpy', 'matplotlib')))"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True)
    assert done.returncode == 0, "a heavy module was imported"
    assert "capo" in done.stdout


def test_help_has_each_of_capos_fields_once_in_its_group():
    ours = [name for name in CAPOConfig.__dataclass_fields__ if name.startswith("capo_")]
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(ours)
    said = train_help(QUICKSTART)
    titles = [said.index(title) for title in GROUPS]
    assert titles == sorted(titles)
    assert "(default: auto, this recipe: adam)" in " ".join(said.split())
    assert "--learning_rate VALUE" not in said and "--help-all" in said


def test_all_fields_are_told_on_request(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["train", QUICKSTART, "--help-all"])
    said = capsys.readouterr().out
    assert leaving.value.code == 0
    assert "--learning_rate" in said and "--capo_mode" in said and "--lora_r" in said


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ("capo_mode: maks", [], "capo_mode='maks' is not one of off, monitor"),
        ("capo_modee: mask", [], "there is no field `capo_modee`; did you mean `capo_mode`"),
        ("capo_top_k: [1]", [], "capo_top_k=[1]"),
        ("- a", [], "a YAML list; write one"),
        ("a: [", [], "not YAML"),
        ("dataset_name: x.jsonl", [], "x.jsonl: no such file"),
        ("model_name_or_path: ./nothing", [], "./nothing: no such folder"),
        ("seed: 1", ["--capo_mode=maks"], "capo_mode='maks' is not one of off, monitor"),
        ("seed: 1", ["--capo-modee", "off"], "on the command line: there is no field `capo_modee`"),
        ("seed: 1", ["--dataset_name", "x.jsonl"], "x.jsonl: no such file"),
    ],
)
def test_errors_that_need_no_torch_do_not_wait_for_it(tmp_path, change, arguments, message):
    (tmp_path / "r.yaml").write_text(change)
    for command in ("train", "calibrate"):
        code = f"import sys; from capo_rl.cli import main; status = main({[command, 'r.yaml', *arguments]!r})\n"
        check = "sys.exit(status + any(name in sys.modules for name in ('torch', 'transformers', 'trl', 'datasets')))"
        done = subprocess.run([sys.executable, "-c", code + check], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("capo: error: ") and message in done.stderr


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_the_first_look_refuses_no_recipe(path):
    first_look(str(path), ["--no_capo_share", "--dataset_name", "arithmetic", "--model_name_or_path", "embedded"])


def test_errors_end_with_status_2_and_no_traceback(tmp_path):
    for arguments, message in (
        (["train", str(RECIPES / "quikstart.yaml")], "did you mean"),
        (["train", QUICKSTART, "--dataset_name", str(tmp_path / "x.jsonl")], "x.jsonl: no such file"),
        (["train", QUICKSTART, "--model_name_or_path", "./nothing"], "./nothing: no such folder"),
    ):
        done = capo(*arguments, "--output_dir", str(tmp_path / "run"))
        assert done.returncode == 2
        assert done.stderr.strip().splitlines()[-1].startswith("capo: error: ")
        assert message in done.stderr
        assert "Traceback" not in done.stderr
