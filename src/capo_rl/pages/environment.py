"""What a bug report needs: versions and hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess

from capo_rl.runs.records import versions

_BESIDE = ("tensorboard", "wandb", "trackio", "vllm", "deepspeed", "verl", "triton", "numpy", "antlr4-python3-runtime")


def environment() -> dict[str, str]:
    """Versions and hardware, for a bug report; nothing that says who or where one is."""
    found = dict(versions())
    for name in _BESIDE:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found["system"] = f"{platform.system()} {platform.release()}, {platform.machine()}"
    found["cpu"] = f"{os.cpu_count()} cores, {memory:.0f} GiB"
    found["gpu"] = _gpus() or "none found (nvidia-smi)"
    return found


def _gpus() -> str:
    asks = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asks, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "; ".join(done.stdout.split("\n")).strip("; ") if done.returncode == 0 else ""
