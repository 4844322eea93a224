"""What a run reads and writes: `data`, `models`, its `records`, recorded `tokens`, `plots`, `progress`, `model_card`."""
