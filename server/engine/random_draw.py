"""The randomness of sampling: 64 bits that depend on (seed, output index) and nothing else, and integers below a bound.

A counter-based generator has no state to keep, lose on preemption or share between requests: output i of a request is
output i of SplitMix64 (Steele, Lea and Flood 2014) started at a scrambled seed. Knows nothing of logits.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: index · gamma visits every 64-bit number once


def random_bits(seeds: Sequence[int], indices: Sequence[int]) -> npt.NDArray[np.uint64]:
    """[n] uniform 64-bit numbers, the indices[i]-th of the stream of seeds[i]; seeds are any integers, taken mod 2^64.

    bits = mix(mix(seed) + (index + 1) · gamma). The inner mix keeps the streams of seeds 1, 2, 3, … apart.
    """
    seed = np.array([value & _MASK for value in seeds], np.uint64)
    index = np.array(indices, np.uint64)
    return _mix(_mix(seed) + (index + np.uint64(1)) * _GAMMA)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's bijection of 64-bit numbers; flipping one bit of z flips each bit of the result half the time."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def scale_below(bits: npt.NDArray[np.uint64], totals: Sequence[int]) -> list[int]:
    """floor(bits · total / 2^64), exactly: uniform over [0, total) but for a bias of at most total / 2^64."""
    return [(int(value) * total) >> 64 for value, total in zip(bits, totals, strict=True)]
