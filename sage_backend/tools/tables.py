# SPDX-License-Identifier: Apache-2.0
"""Tables in plain text."""


def table(rows: list[list[str]]) -> str:
    """Align the columns of rows of equal length: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
