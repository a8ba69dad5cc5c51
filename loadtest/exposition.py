"""A Prometheus page read as numbers: series by name, summed over their labels. Knows nothing of what they mean."""

import re
from collections import Counter

_ADAPTER_TRAFFIC = re.compile(
    r"^([\w:]*(?:adapter|lora)[\w:]*(?:load|evict|activat)[\w:]*_(?:total|count))(?:\{[^}]*\})? (\S+)$", re.MULTILINE
)
"""Counters of adapters brought in or put out, under whatever name a server gives them."""


def value(page: str, name: str, **labels: str) -> float | None:
    """The sum of all series called `name` that carry these labels; None when there is none."""
    series = re.findall(rf"^{re.escape(name)}(\{{[^}}]*\}})? (\S+)$", page, re.MULTILINE)
    wanted = [re.compile(rf'[{{,]{key}="{re.escape(text)}"') for key, text in labels.items()]
    values = [number for carried, number in series if all(each.search(carried) for each in wanted)]
    return sum(map(float, values)) if values else None


def adapter_traffic(page: str) -> Counter[str]:
    """Series → its count, for all counters of adapter loads, activations and evictions on the page."""
    totals: Counter[str] = Counter()
    for name, count in _ADAPTER_TRAFFIC.findall(page):
        totals[name] += round(float(count))
    return totals
