"""The engine's whole step, host included: scheduled, launched ahead, sampled and read, with requests that go on."""

import statistics
import time
from typing import Any

from adapters.adapter_ref import AdapterUse
from loadtest.gpu.timing import Device
from server.engine.engine import Engine
from server.engine.request import Request, SamplingParams


def measure_serving(device: Device, engine: Engine, num_rows: int, mixes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Milliseconds of `engine.step()` at `num_rows` decoding rows, for each number of adapters, in turns."""
    versions = engine.adapters.active_versions
    readings: dict[int, list[float]] = {n: [] for n in mixes}
    for _ in range(device.rounds):
        for n in mixes:
            readings[n].append(_one(device, engine, num_rows, [AdapterUse(version) for version in versions[:n]]))
    return [
        {"step": "serving", "rows": num_rows, "adapters": n, "ms": 1e3 * statistics.median(values)}
        for n, values in readings.items()
    ]


def _one(device: Device, engine: Engine, num_rows: int, uses: list[AdapterUse]) -> float:
    params = SamplingParams(temperature=0.0, max_tokens=device.repeats + 16, ignore_eos=True)
    for row in range(num_rows):
        request = Request(
            request_id=str(row),
            prompt_token_ids=tuple(range(row, row + 8)),
            sampling_params=params,
            adapters=(uses[row * len(uses) // num_rows],) if uses else (),
            arrival_time=float(row),
        )
        engine.add_request(request)
    while engine.stats().num_waiting:
        engine.step()
    for _ in range(4):  # past the last prompt, into steps of decode rows only
        engine.step()
    device.synchronize()
    began = time.perf_counter()
    for _ in range(device.repeats):
        engine.step()
    seconds = (time.perf_counter() - began) / device.repeats
    for row in range(num_rows):
        engine.abort(str(row))
    while engine.has_work:
        engine.step()
    return seconds
