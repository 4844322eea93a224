"""What a person reads after a run: `report` and `explain` are pages, `doctor` says what became of a run, and `closing`
what `capo train` ends with."""
