#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draw the panels of dashboard.json from a running Prometheus. Needs matplotlib.

    python deploy/grafana/render.py http://127.0.0.1:9090 .venv/dashboard.png --seconds 120
"""

import argparse
import time
from pathlib import Path

from prometheus import Prometheus, panels, series_name

COLUMNS = 3
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "µ"))
SYMBOLS = {"s": "s", "bytes": "B", "Bps": "B/s", "ops": "op/s", "short": "", "percentunit": "%"}
"""What follows a number in each of Grafana's units that the dashboard uses."""


def with_unit(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{100 * value:g}%"
    scale, prefix = next(((s, p) for s, p in PREFIXES if abs(value) >= s and (s >= 1 or SYMBOLS[unit])), (1, ""))
    return f"{value / scale:g} {prefix}{SYMBOLS[unit]}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of Prometheus")
    parser.add_argument("image", type=Path)
    parser.add_argument("--seconds", type=float, default=3600, help="how far to look back")
    parser.add_argument("--rate-interval", default="1m", help="in place of Grafana's $__rate_interval")
    arguments = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    prometheus, end = Prometheus(arguments.url), time.time()
    shown = list(panels(arguments.rate_interval))
    rows = -(-len(shown) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(6 * COLUMNS, 3 * rows), layout="constrained", squeeze=False)
    for axis, panel in zip(axes.flat, shown, strict=False):
        for query in panel.queries:
            for labels, points in prometheus.query_range(query.expression, end - arguments.seconds, end):
                times, values = zip(*points, strict=True)
                axis.plot([at - end for at in times], values, label=series_name(query.legend, labels))
        axis.set_title(panel.title)
        axis.set_ylim(0, None if axis.dataLim.ymax > 0 else 1)
        axis.yaxis.set_major_formatter(lambda value, _, unit=panel.unit: with_unit(value, unit))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g} s")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)
        else:
            axis.text(0.5, 0.5, "no data", ha="center", va="center", transform=axis.transAxes)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    figure.savefig(arguments.image, dpi=70)


if __name__ == "__main__":
    main()
