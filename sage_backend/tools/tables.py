# SPDX-License-Identifier: Apache-2.0
"""Tables in plain text."""


def table(rows: list[list[str]]) -> str:
    """Align the columns: the first to the left, the others to the right. The last cell of a row that is shorter than the first
    row spans the remaining columns and does not widen them."""
    count = len(rows[0])
    widths = [max(len(row[0]) for row in rows)]
    widths += [max(map(len, column)) for column in zip(*(row[1:] for row in rows if len(row) == count), strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        if len(row) < count:
            cells[-1] = row[-1]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    return "\n".join(lines)
