"""The picture of benchmarks/serving.py: throughput and latency of each batching strategy, as SVG."""

from __future__ import annotations

import math
from typing import Any

WIDTH, ROW, LEFT, BAR = 720, 24, 90, 520
COLOURS = {"static": "#b0b7c3", "dynamic": "#7f9fc9", "in-flight": "#1f6feb"}
PANELS = (
    ("tokens_per_second", "tokens/s"), ("latency_p50", "latency p50, seconds"), ("latency_p95", "latency p95, seconds"),
    ("first_token_p95", "first token p95, seconds"),
)  # fmt: skip


def picture(strategies: dict[str, Any]) -> str:
    """Returns bars of each figure, one a strategy, with the intervals of their means."""
    parts, top = [], 10
    for name, title in PANELS:
        longest = max(sum(x for x in row[name] if math.isfinite(x)) for row in strategies.values())
        parts.append(f'<text x="{LEFT}" y="{top + 14}" font-weight="bold">{title}</text>')
        top += ROW
        for strategy, row in strategies.items():
            mean, half = row[name]
            width, middle = BAR * mean / longest, top + 9
            parts.append(f'<text x="{LEFT - 8}" y="{top + 14}" text-anchor="end">{strategy}</text>')
            colour = COLOURS[strategy]
            parts.append(f'<rect x="{LEFT}" y="{top}" width="{width:.1f}" height="18" fill="{colour}"/>')
            if math.isfinite(half) and half:
                start, stop = (LEFT + BAR * max(0, x) / longest for x in (mean - half, mean + half))
                parts.append(f'<path d="M{start:.1f} {middle}H{stop:.1f}" stroke="#24292f" stroke-width="2"/>')
            parts.append(f'<text x="{LEFT + BAR + 12}" y="{top + 14}">{mean:.4g}</text>')
            top += ROW
        top += 8
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" font-family="sans-serif"'
    background = f'<rect width="{WIDTH}" height="{top}" fill="white"/>'
    return "\n".join([f'{head} font-size="13">', background, *parts, "</svg>", ""])
