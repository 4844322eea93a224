"""`capo eval`: eight `benchmarks`, the `generation` of completions, and `evaluate`, which grades and counts them."""
