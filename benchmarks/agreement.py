"""Do a contender's loss and gradient agree with the reference? A wrong answer has no time."""

import numpy as np

# The largest relative difference, and the absolute one below it in units of a row's own gradient: the targets'
# entries of rivals are p - 1, in which a small difference cancels.
TOLERANCE = {"float32": (1e-4, 1e-6), "float64": (1e-8, 1e-12)}


def compare(result, expected, dtype):
    """Return the largest relative differences of (loss, grad) from `expected`, and what is wrong with them or None.

    `result` may be the loss alone. Entries too small for the dtype to hold in full precision do not count.
    """
    loss, grad = result if isinstance(result, tuple) else (result, None)
    relative, absolute = TOLERANCE[dtype]
    differences = {"loss_difference": abs(float(loss) / expected[0] - 1)}
    agree = differences["loss_difference"] <= relative
    if grad is not None:
        largest, grad, exact_grad = 0.0, np.asarray(grad), expected[1]
        rows, classes = exact_grad.shape
        if grad.shape != exact_grad.shape or grad.dtype != exact_grad.dtype:
            return differences, f"gives {grad.dtype} {grad.shape}, not {exact_grad.dtype} {exact_grad.shape}"
        block = max(1, 1_000_000 // classes)
        for start in range(0, rows, block):
            exact = exact_grad[start : start + block]
            gap = np.abs(grad[start : start + block] - exact)
            size = np.abs(exact)
            agree = agree and bool((gap <= relative * size + absolute / rows).all())
            full = size >= np.finfo(dtype).tiny
            largest = float(np.maximum(largest, (gap[full] / size[full]).max(initial=0.0)))  # nan stays
        differences["grad_difference"] = largest
    return differences, None if agree else f"disagrees with the reference: {differences}"
