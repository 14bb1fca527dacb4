"""The variants of spectral normalization, one row each.

Every variant divides a weight W by the mean of the spectral norms of its views and multiplies by a scale c::

    W̄ = c · W / mean(sigma of each view)

so a variant is defined by its views and by whether c is free. Kernels take views and a scale, not a variant.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One row: the views whose norms are averaged, and whether the user may choose the scale."""

    name: str
    views: tuple[str, ...]
    free_scale: bool
    source: str


VARIANTS: dict[str, Variant] = {
    row.name: row
    for row in (
        Variant("sn", ("out",), False, "Miyato et al., ICLR 2018, section 2.1"),
        Variant("ssn", ("out",), True, "Lin et al., NeurIPS 2021: SN times a constant"),
        Variant("bsn", ("out", "in"), False, "Lin et al., NeurIPS 2021: mean of the norms of both reshapes"),
        Variant("bssn", ("out", "in"), True, "Lin et al., NeurIPS 2021: BSN times a constant"),
    )
}


def get(name: str) -> Variant:
    """Look a variant up by its name.

    Raises:
        ValueError: ``name`` is not in the table; the message lists the names that are.
    """
    if not isinstance(name, str) or name not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {name!r}")
    return VARIANTS[name]
