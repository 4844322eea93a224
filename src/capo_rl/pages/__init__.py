"""What a person reads after a run: `report` and `explain` are pages, made of `page`, `drawing`, `completions`,
`token_text` and `words`; `doctor` says what became of a run whose figures `run_log` reads, `advice` what to change of
its settings, `environment` what a bug report needs, and `closing` what `capo train` ends with."""
