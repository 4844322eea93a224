"""The paper's method, of torch alone: a model of the last layer and of the optimizer, and what they predict.

In its order: `last_layer` makes tokens to (h, support, π, u), with the output `head` in tiles; `step` plans the
optimizer's step, `sharded_moments` spreads what it keeps over processes, and `step_model` says which fits; `shifts` are
m_H and m_F along it; `selection` accepts or rejects. `kernels` are the same in Triton, each beside the plain form it
must equal, `reference` is the dense oracle in float64 that all must equal, and `processes` sums over the processes of a
step.
"""
