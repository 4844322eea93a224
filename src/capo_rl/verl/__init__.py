"""CAPO on verl: an FSDP engine whose gradient leaves out the tokens that the curvature model rejects."""

from capo_rl.verl.engine import AGGREGATIONS, MASKABLE_LOSSES, CAPOActorConfig, CAPOEngine, CAPOSettings

__all__ = ["AGGREGATIONS", "MASKABLE_LOSSES", "CAPOActorConfig", "CAPOEngine", "CAPOSettings"]
