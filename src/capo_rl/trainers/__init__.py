"""Training by TRL: `trl` is its GRPOTrainer with two seams. What they lead to: `backbone` sees hidden states, `masking`
writes verdicts into the loss, `optimizer_steps` is what happens around a step, of which `measuring` runs the forward
passes again, `step_choice` finds the model of the optimizer's step, `rollouts` and `checks` are what comes before,
`state` is what checkpoints hold beside TRL's. `checkpoints` are whole or not there, `train` makes a run of a recipe.
`rounding` warns of weights that updates don't reach, `monitor` and `alarm` watch a stock trainer, `calibrate` finds
bounds from a few steps that `watching` has seen."""
