"""`capo bench`: grids of runs (`bench`), what is measured on problems they never see (`held_out`), other masks to
compare with (`rivals`), changes that ask for a cause (`interventions`), and the paper's `figures` and tables."""
