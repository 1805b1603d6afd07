"""Which NVIDIA driver a CUDA version needs.

From CUDA 11 on, what is built for one major version runs on the first driver branch of that version and on newer
ones (NVIDIA, "CUDA Compatibility", table of driver version ranges for minor version compatibility).
"""

from __future__ import annotations

from collections.abc import Mapping

#: CUDA major version -> the oldest driver branch that serves it.
MINIMUM_BRANCH: Mapping[int, int] = {11: 450, 12: 525, 13: 580}


def needed(cuda: str) -> int | None:
    """The oldest driver branch that serves this CUDA version; ``None`` where the table does not know it.

    >>> needed("13.0")
    580
    """
    major = cuda.partition(".")[0]
    return MINIMUM_BRANCH.get(int(major)) if major.isdecimal() else None


def too_old(driver: str, cuda: str) -> bool:
    """Whether ``driver`` ("550.54.15") is known to be too old for ``cuda``."""
    branch, least = driver.partition(".")[0], needed(cuda)
    return least is not None and branch.isdecimal() and int(branch) < least
