"""Where bounds come from, other than the paper: `rejection_rate` gives those that reject a given share of the tokens,
`kl_regression` what a prediction is worth in nats, `choice` makes thresholds of both from watched steps, and `adapt`
moves bounds while a run trains."""
