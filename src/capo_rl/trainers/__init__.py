"""Training by TRL: `trl` is its GRPOTrainer with two seams, `measuring` runs its forward passes again, `state` is what
its checkpoints hold beside TRL's, `checkpoints` are whole or not there, `train` makes a run of a recipe. `rounding`
warns of weights that updates don't reach, `monitor` and `alarm` watch a stock trainer, `calibrate` finds bounds from a
few steps that `watching` has seen."""
