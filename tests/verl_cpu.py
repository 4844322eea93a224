"""verl without an accelerator: the platform plugin that lets its FSDP engine run on a CPU, loaded by verl itself.

verl ships platforms for CUDA, ROCm and NPU only, and has a registry for others. Two more things stand in the way, and
are stood in for here: TRL 1.16 has lost a class that verl changes a method of wherever TRL is installed, and verl asks
torch for the process group "cpu:gloo,cpu:gloo", which torch refuses, unless there is one already.
"""

from __future__ import annotations

import os
import sys
import types
from contextlib import contextmanager

import torch
import torch.distributed as dist
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

_ppo = types.ModuleType("trl.experimental.ppo")
_ppo.AutoModelForCausalLMWithValueHead = type("AutoModelForCausalLMWithValueHead", (), {})
sys.modules.setdefault("trl.experimental.ppo", _ppo)


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
        return "CPU"

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


def cpu_worker():
    """verl's own `TrainingWorker`, with its process group made beforehand and a look inside."""
    from verl.single_controller.base.decorator import Dispatch, register
    from verl.workers.engine_workers import TrainingWorker

    class CPUWorker(TrainingWorker):
        def __init__(self, config):
            torch.set_num_threads(1)
            dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
            super().__init__(config)

        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def state(self):
            """The step model's state, the weights, and what kind of engine holds them."""
            weights = {name: each.full_tensor() for name, each in self.engine.module.state_dict().items()}
            return type(self.engine).__name__, self.engine.planner.step.state_dict(), weights

    return CPUWorker
