"""Loads what of verl the others need, or says which extra brings it; and lets verl 0.9 live beside TRL 1.16."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

try:
    importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
except ImportError as error:
    raise ImportError(
        f"capo_rl.verl needs verl 0.9 and Ray, which the extra capo-rl[verl] installs ({error}); "
        "how to install it beside TRL is in docs/verl.md"
    ) from error

# Wherever TRL is installed, verl's FSDP engine changes a method of a class that TRL 1.16 no longer has: an empty one.
_trl = importlib.util.find_spec("trl")
if _trl and not any(Path(folder, "experimental", "ppo").exists() for folder in _trl.submodule_search_locations or ()):
    _ppo = types.ModuleType("trl.experimental.ppo")
    vars(_ppo)["AutoModelForCausalLMWithValueHead"] = type("AutoModelForCausalLMWithValueHead", (), {})
    sys.modules[_ppo.__name__] = _ppo
