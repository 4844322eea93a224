"""One optimizer step: what is in it, and how long it is.

`updates` counts a run's steps and measures them; `planner` does so too, selects over a step's micro-batches and
follows its moments; `share` is how much of the step the accepted tokens have earned; `divergence` is the KL an update
really had, and `trust_region` holds updates to a budget of it; `rerun` runs a micro-batch again for that; `telemetry`
is what is logged. Free of any trainer.
"""
