"""The two heavy loops of the curvature model in Triton, each in one file with the plain torch form it must equal.

`adam_shifts`    v = U h, s and c of the Adam step that each token alone would take
`moment_update`  the last layer's sparse gradient and Adam's moments after it

Triton comes with torch's builds for CUDA; without it, or away from CUDA, the plain forms run.
"""

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["jit", "tl", "triton", "uses_triton"]

# Without Triton a kernel stays a Python function that nobody calls.
jit = triton.jit if triton else lambda function: function


def uses_triton(tensor: Tensor) -> bool:
    """Whether work on this tensor goes to the Triton forms."""
    return triton is not None and tensor.is_cuda
