"""The numbers behind a picture as CSV, to the last bit: a picture is drawn from what is read back."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Columns = Mapping[str, type]  # str, int or float


def text(columns: Columns, rows: Iterable[Sequence[Any]]) -> str:
    """As CSV; NaN, of what is not known, is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(x) for x in row] for row in rows)
    return out.getvalue()


def parse(columns: Columns, written: str, where: Path) -> list[Row]:
    """Rows of CSV. Raises ValueError for other columns, and for a cell that is no number where one must be."""
    reader = csv.reader(io.StringIO(written))
    head = next(reader, [])
    if head != list(columns):
        raise ValueError(f"{where} must have the columns {', '.join(columns)}, got {', '.join(head) or 'none'}")
    rows = []
    for cells in reader:
        try:
            if len(cells) != len(columns):
                raise ValueError(f"{len(cells)} cells in place of {len(columns)}")
            rows.append({name: _value(kind, x) for (name, kind), x in zip(columns.items(), cells, strict=True)})
        except ValueError as error:
            raise ValueError(f"{where} must be CSV of a figure, got line {reader.line_num}: {error}") from error
    if not rows:
        raise ValueError(f"{where} must have rows, got none")
    return rows


def _cell(x: Any) -> str:
    if isinstance(x, float):
        return "" if math.isnan(x) else repr(float(x))
    return str(x)


def _value(kind: type, cell: str) -> Any:
    return math.nan if kind is float and not cell else kind(cell)
