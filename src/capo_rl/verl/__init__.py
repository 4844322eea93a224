"""CAPO on verl: an FSDP engine whose gradient leaves out the tokens that the curvature model rejects.

Needs the extra `capo-rl[verl]`. Loading this package (`VERL_USE_EXTERNAL_MODULES=capo_rl.verl`) registers `CAPOEngine`
for this machine's accelerator, where verl's registry looks before it looks for verl's own; `CAPOActorConfig` in the
place of verl's actor config (`actor._target_`) carries the settings and switches it on. Nothing of verl is changed.

`engine` is the adapter, and `actor` its config with `settings` in it; `batches` reads verl's packed micro-batches,
`again` runs them once more to measure an update, `planners` makes the planner of the settings, `checkpoints`
refuses those of another number of workers; `installed` says so where verl is missing. The mathematics is `planning`'s.
"""

from capo_rl.verl import installed  # noqa: F401 (before the others, which need verl)
from capo_rl.verl.actor import AGGREGATIONS, MASKABLE_LOSSES, CAPOActorConfig
from capo_rl.verl.engine import CAPOEngine
from capo_rl.verl.settings import CAPOSettings

__all__ = ["AGGREGATIONS", "MASKABLE_LOSSES", "CAPOActorConfig", "CAPOEngine", "CAPOSettings"]
