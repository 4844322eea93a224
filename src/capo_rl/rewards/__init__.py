"""What a completion is worth. Completions are not trusted: `grading` judges answers in processes with deadlines,
`accuracy` makes a reward of it, `constraints` are rewards that a program checks, and `guarded` lets any reward fail."""
