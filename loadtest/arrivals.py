"""When requests are sent in an open loop: seeded gaps, rescaled so that the last one is sent at exactly count / rate.

Knows nothing of what is sent. A closed loop has no schedule: there the server's own speed decides.
"""

import itertools
import random

CLOSED, POISSON, GAMMA, CONSTANT = "closed", "poisson", "gamma", "constant"
ARRIVALS = (CLOSED, POISSON, GAMMA, CONSTANT)


def check_arrivals(arrivals: str, rate: float | None, cv: float) -> None:
    """Raises ValueError for what cannot be a schedule, or would not be the one its name says."""
    if arrivals not in ARRIVALS:
        raise ValueError(f"arrivals {arrivals!r} is not one of {', '.join(ARRIVALS)}")
    if arrivals == CLOSED:
        if rate is not None:
            raise ValueError(
                f"a closed loop has no rate ({rate} was given); choose poisson, gamma or constant arrivals"
            )
        return
    if rate is None or not rate > 0:
        raise ValueError(f"{arrivals} arrivals need a rate above 0 requests/s, not {rate}; pass --rate")
    if not cv > 0:
        raise ValueError(f"the coefficient of variation is {cv}; it must be above 0 (for no variation: constant)")
    if arrivals != GAMMA and cv != 1:
        raise ValueError(f"{arrivals} arrivals have no coefficient of variation to set to {cv}; choose gamma")


def schedule(count: int, *, arrivals: str, rate: float, cv: float, seed: int) -> list[float]:
    """Seconds from the start at which each of `count` requests is sent, ascending; the last is count / rate.

    Gaps are gamma distributed with mean 1 / rate and standard deviation cv / rate: shape 1 / cv², scale cv² / rate.
    cv = 1 is a Poisson process; a larger one is burstier (1 / cv² is the `burstiness` of other tools).
    """
    gaps = _gaps(count, arrivals=arrivals, cv=cv, seed=seed)
    moments = list(itertools.accumulate(gaps))
    stretch = count / rate / moments[-1]
    return [moment * stretch for moment in moments]


def _gaps(count: int, *, arrivals: str, cv: float, seed: int) -> list[float]:
    """In units of the mean gap, before rescaling."""
    if arrivals == CONSTANT:
        return [1.0] * count
    chance = random.Random(f"arrivals/{seed}")
    return [chance.gammavariate(1 / cv**2, cv**2) for _ in range(count)]
