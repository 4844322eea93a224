"""`capo bench`: grids of runs (`bench`), what is measured on problems they never see (`held_out`), other masks to
compare with (`rivals`), changes that ask for a cause (`interventions`), and a sampler that lags (`off_policy`). Of the
results, `arms` says what is read, `figures` (with `drawing`) and `tables` are the paper's and more, and `results` makes
all of them."""
