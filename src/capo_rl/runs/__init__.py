"""What a run reads and writes: `data` and `models`; its `records`, recorded `tokens`, `plots`, `progress` and
`model_card`, and a checkpoint's `saved_state`; and what of its settings is a secret (`secrets`)."""
