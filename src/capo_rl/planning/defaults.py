"""The numbers of the default mode, which the measurements recommend (docs/testbed.md); chosen on tuning seeds."""

KL_BUDGET = 5e-3  # the trust region: nats a token that an update may have
KL_START = 2**-10  # slow start: the share of the learning rate that the first step may have
