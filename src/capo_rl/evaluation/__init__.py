"""`capo eval`: eight `benchmarks`, the `generation` of completions, `evaluate`, which grades them into a `folder`, the
`summary` of what they come to beside another's, and `regrade`, which grades them again."""
