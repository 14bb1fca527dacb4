"""Classes as a command line names them."""

from __future__ import annotations

from collections.abc import Sequence


def chosen(classes: Sequence[int], count: int) -> Sequence[int]:
    """The labels ``classes``, or all of ``count`` classes where there are none.

    Raises:
        ValueError: there are no such classes.
    """
    outside = [label for label in classes if not 0 <= label < count]
    if outside:
        raise ValueError(f"classes must be labels from 0 to {count - 1}, got {' '.join(map(str, outside))}")
    return classes or range(count)
