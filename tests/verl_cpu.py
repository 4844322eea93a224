"""verl without an accelerator: the platform plugin that lets its FSDP engine run on a CPU, loaded by verl itself, its
workers on this machine alone, and its batches without its trainer.

verl ships platforms for CUDA, ROCm and NPU only, and has a registry for others. It asks torch for the process group
"cpu:gloo,cpu:gloo", which torch refuses, so here it is given "gloo".
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import wraps
from importlib.resources import files
from pathlib import Path

import torch
import torch.distributed as dist
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


@PlatformRegistry.register("cpu")
class PlatformCPU(PlatformBase):
    """What verl asks of a device, answered for a CPU."""

    device_name = "cpu"
    vendor_name = "none"

    class device_module:
        max_memory_allocated = max_memory_reserved = memory_allocated = memory_reserved = staticmethod(lambda *_: 0)
        mem_get_info = staticmethod(lambda *_: (0, 0))
        current_device = staticmethod(lambda: torch.device("cpu"))
        empty_cache = synchronize = staticmethod(lambda *_: None)
        is_available, get_device_name = staticmethod(lambda: True), staticmethod(lambda *_: "CPU")
        get_rng_state, set_rng_state = staticmethod(torch.get_rng_state), staticmethod(torch.set_rng_state)

    def is_available(self):
        return True

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return 1

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self):
        return "GPU"  # what verl's trainer counts; Ray is told of as many as it shall have workers

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None

    @contextmanager
    def nvtx_range(self, msg):
        yield

    def _nothing(self, *args):
        """A CPU has no such thing to set."""

    set_device = synchronize = manual_seed = manual_seed_all = set_allocator_settings = _nothing
    empty_cache = profiler_start = profiler_stop = _nothing


def _as_torch_has_it(init_process_group):
    @wraps(init_process_group)
    def init(backend=None, **how):
        return init_process_group("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, **how)

    return init


dist.init_process_group = _as_torch_has_it(dist.init_process_group)


# ---- a mini-batch ----------------------------------------------------------------------------------------------------


def packed(batch, remove_padding=True, temperature=0.9, nested=False, micro_batch=4, entropy=False):
    """What verl's trainer makes of a batch before it hands it to the engine."""
    from verl.utils import tensordict_utils

    mask = batch["response_mask"]
    attended = batch.get("attended", mask)  # the response's tokens, which the loss may leave out
    prompt_mask = torch.ones_like(batch["prompts"])
    attention_mask = torch.cat([prompt_mask, attended], dim=1)
    tensors = {
        "input_ids": torch.cat([batch["prompts"], batch["responses"]], dim=1),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        "prompts": batch["prompts"],
        "responses": batch["responses"],
        "response_mask": mask,
        "advantages": batch["advantages"],
        "old_log_probs": batch.get("old_log_probs", torch.zeros(mask.shape)),
    }
    settings = {
        "global_batch_size": len(mask),
        "use_remove_padding": remove_padding,
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": micro_batch,
        "use_fused_kernels": False,
        "calculate_entropy": entropy,
        **({} if nested else {"max_response_len": mask.shape[1]}),
    }
    tensors |= {name: batch[name] for name in ("ref_log_prob", "rollout_is_weights") if name in batch}
    if "uid" in batch:
        tensors["uid"] = batch["uid"]
    (tensors if isinstance(temperature, torch.Tensor) else settings)["temperature"] = temperature
    data = tensordict_utils.get_tensordict(tensors, settings)
    for name in ("input_ids", "position_ids"):
        data[name] = jagged(data[name], attention_mask.sum(1))
    data["loss_mask"] = mask
    if nested:  # as verl's newer trainer keeps them
        lengths = mask.sum(1)
        for name in ("advantages", "old_log_probs", "responses", "response_mask", "loss_mask"):
            data[name] = jagged(data[name], lengths)
        data["prompts"] = jagged(batch["prompts"], torch.full_like(lengths, batch["prompts"].shape[1]))
    return data


def jagged(rows, lengths):
    """The first `lengths` [B] entries of each of the rows [B, T]."""
    values = torch.cat([row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)])
    return torch.nested.nested_tensor_from_jagged(values, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))


ROOT = Path(__file__).parents[1]


def _python_path():
    """Where Ray's processes find these tests, this package, and what the first process found there."""
    return os.pathsep.join([str(ROOT / "tests"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])


# ---- workers ---------------------------------------------------------------------------------------------------------


@contextmanager
def workers_on_ray(count, config, loss):
    """verl's own worker group of `count` processes on a Ray of this machine alone, which ends with it."""
    import ray
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

    variables = ("VERL_PLATFORM", "VERL_USE_EXTERNAL_MODULES")
    environment = {name: os.environ[name] for name in variables}
    environment |= {"PYTHONPATH": _python_path(), "OMP_NUM_THREADS": "1"}
    how = {"include_dashboard": False, "log_to_driver": False, "runtime_env": {"env_vars": environment}}
    ray.init(address="local", num_cpus=2, **how)
    try:
        group = RayWorkerGroup(
            RayResourcePool([count], use_gpu=False, max_colocate_count=1),
            RayClassWithInitArgs(ray.remote(cpu_worker()), config=config),
            device_name="cpu",
        )
        group.reset()
        group.set_loss_fn(loss)
        yield group
    finally:
        ray.shutdown()


def update(group, data):
    """One optimizer step on a packed mini-batch; returns the metrics verl would log, one list for each."""
    from verl.utils import tensordict_utils

    size = tensordict_utils.get(data, "global_batch_size")
    shuffle = {"shuffle": False}
    tensordict_utils.assign_non_tensor(data, mini_batch_size=size, epochs=1, seed=0, dataloader_kwargs=shuffle)
    return tensordict_utils.get(group.train_mini_batch(data).get(), "metrics")


def fsdp1_on_cpu():
    """Let FSDP1 send the first process's weights to the others on a CPU, which it refuses and gloo can do."""
    from torch.distributed.fsdp import _init_utils

    _init_utils._check_module_states_for_sync_module_states = lambda states: None


def cpu_worker():
    """verl's own `TrainingWorker`, with a look inside."""
    from verl.single_controller.base.decorator import Dispatch, register
    from verl.workers.engine_workers import TrainingWorker

    class CPUWorker(TrainingWorker):
        def __init__(self, config):
            torch.set_num_threads(1)
            fsdp1_on_cpu()
            super().__init__(config)

        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def state(self):
            """The step model's state, the weights, and what kind of engine holds them."""
            state = self.engine.module.state_dict()
            weights = {
                name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in state.items()
            }
            return type(self.engine).__name__, self.engine.planner.step.state_dict(), weights

    return CPUWorker


# ---- verl's trainer --------------------------------------------------------------------------------------------------

# What the recipe says of a machine with GPUs and of a large model, as it has to be here.
ON_CPU = {
    "trainer.device": "cpu",
    "+ray_kwargs.ray_init.address": "local",
    "+ray_kwargs.ray_init.include_dashboard": False,
    "ray_kwargs.ray_init.num_cpus": 32,  # verl's count of what it may start; with fewer its transfer queue waits
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
    "actor_rollout_ref.rollout.name": "transformers",  # verl_rollout
    "actor_rollout_ref.rollout.agent.num_workers": 1,
    "reward.num_workers": 1,
    "data.dataloader_num_workers": 0,
    "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
    "actor_rollout_ref.model.enable_gradient_checkpointing": False,
    "actor_rollout_ref.model.custom_chat_template": "'{% for each in messages %}{{ each.content }}{% endfor %}'",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision": "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
    "actor_rollout_ref.rollout.calculate_log_probs": True,  # to compare the server's with the trainer's
    "trainer.logger": "[console,file]",
}


def small_run(folder, workers=1):
    """The recipe's settings for the model inside the package on its arithmetic, whose problems are put into `folder`.

    16 completions a step as on the testbed, for two problems; verl grades them with its own MATH reward.
    """
    from datasets import Dataset

    from capo_rl.tasks.arithmetic import problems

    for split, seed, count in (("train", 0, 2048), ("test", 1, 256)):
        rows = [row for row, _ in zip(problems(seed), range(count), strict=False)]
        Dataset.from_list(
            [
                {
                    "data_source": "DigitalLearningGmbH/MATH-lighteval",
                    "prompt": [{"role": "user", "content": row["problem"]}],
                    "ability": "math",
                    "reward_model": {"style": "rule", "ground_truth": row["answer"]},
                    "extra_info": {"index": i},
                }
                for i, row in enumerate(rows)
            ]
        ).to_parquet(folder / f"{split}.parquet")
    return ON_CPU | {
        "+ray_kwargs.ray_init.num_gpus": workers,
        "trainer.n_gpus_per_node": workers,
        "trainer.default_local_dir": folder / "checkpoints",
        "hydra.run.dir": folder / "hydra",
        "actor_rollout_ref.model.path": files("capo_rl") / "embedded",
        "actor_rollout_ref.rollout.tensor_model_parallel_size": workers,  # one server, whatever the workers
        "data.train_files": folder / "train.parquet",
        "data.val_files": folder / "test.parquet",
        "data.max_prompt_length": 64,
        "data.max_response_length": 48,
        "data.train_batch_size": 2,
        "data.seed": 0,
        "actor_rollout_ref.rollout.temperature": 1.0,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 16 // workers,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 2,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 16 // workers,
        "actor_rollout_ref.actor.capo.max_missing_mass": 0.5,
    }


def run_trainer(settings, folder, name, kill_after=None, tries=3):
    """What verl's trainer logs, a mapping for each step, started by the recipe's `run.sh` with these settings.

    It is killed once it has logged `kill_after` steps; its words go to a log in the folder. Ray gives itself 30 seconds
    to start, which a busy machine may not have, so it may try again.
    """
    metrics, log = folder / f"{name}.jsonl", folder / f"{name}.log"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": _python_path(),
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "verl_cpu,verl_rollout",
        "VERL_FILE_LOGGER_PATH": str(metrics),
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", ROOT / "recipes" / "verl" / "run.sh", *(f"{name}={value}" for name, value in settings.items())]
    with open(log, "w") as words:
        process = subprocess.Popen(command, env=environment, stdout=words, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and (kill_after is None or len(_logged(metrics)) < kill_after):
                time.sleep(0.2)
            if process.poll() and tries > 1 and "node timed out during startup" in log.read_text():
                return run_trainer(settings, folder, name, kill_after, tries - 1)
            if process.poll():
                raise RuntimeError(f"verl's trainer ended with {process.returncode}:\n{log.read_text()[-5000:]}")
        finally:
            process.kill()  # Ray's processes end with the one that started them
            process.wait()
    return _logged(metrics)


def _logged(metrics):
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [{"step": each["step"]} | each["data"] for each in map(json.loads, lines)]
