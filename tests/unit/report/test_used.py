"""What each stage used, beside what it was forecast to need, on the page of an attempt."""

from __future__ import annotations

import re

from runs import EMPTY, RELEASED

from trimtab.planning.resources import Resources
from trimtab.report import attempt_html

GB = 10**9


def test_what_was_used_stands_beside_the_forecast():
    used = {
        "quantize": Resources(gpus=1, gpu_bytes=6 * GB, host_bytes=4 * GB, disk_bytes=9 * GB, seconds=90),
        "calibrate": Resources(host_bytes=17 * GB, seconds=61),
    }
    forecast = {"calibrate": Resources(host_bytes=20 * GB, seconds=120), "engine": Resources(seconds=9)}
    page = attempt_html(RELEASED.model_copy(update={"used": used}), forecast=forecast)
    rows = re.findall(r'<tr><th scope="row">(calibrate|quantize|engine)</th>(.*?)</tr>', page)
    cells = {stage: re.findall(r'>([^<]*)<br><span class="muted">([^<]*)<', row) for stage, row in rows}
    assert cells == {
        "calibrate": [("–", "–"), ("17 GB", "20 GB"), ("–", "–"), ("1.0 min", "2.0 min")],
        "quantize": [("1 x 6.0 GB", "–"), ("4.0 GB", "–"), ("9.0 GB", "–"), ("1.5 min", "–")],
    }


def test_nothing_is_said_where_nothing_was_used():
    assert "What each stage used" not in attempt_html(EMPTY)
