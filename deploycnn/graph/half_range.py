"""What FP16's range holds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: Largest finite FP16 number.
HALF_MAX = 65504.0

#: Smallest normal FP16 number: a value all of whose elements are smaller has lost its precision.
HALF_TINY = 2.0**-14

#: Rounding to normal FP16 numbers loses at most 2^-11 of each value. More than twice that, in norm, means
#: that the tensor lives among the subnormal numbers (below 6.1e-5) or vanishes altogether.
MAX_RELATIVE_ERROR = 2.0**-10


def overflows(content: npt.NDArray[np.float32]) -> bool:
    """Whether a finite element becomes infinite in FP16. Infinities stay what they are."""
    finite = content[np.isfinite(content)]
    return bool(finite.size and np.abs(finite).max() > HALF_MAX)


def vanishes(content: npt.NDArray[np.float32], *, elementwise: bool = False) -> bool:
    """Whether FP16's small exponent range costs more than its rounding does (see ``MAX_RELATIVE_ERROR``)."""
    exact = content[np.isfinite(content) & (np.abs(content) <= HALF_MAX)].astype(np.float64)
    if exact.size == 0 or not exact.any():
        return False
    errors = np.abs(exact - exact.astype(np.float16).astype(np.float64))
    if elementwise:
        return bool((errors > MAX_RELATIVE_ERROR * np.abs(exact)).any())
    return bool(np.linalg.norm(errors) > MAX_RELATIVE_ERROR * np.linalg.norm(exact))
