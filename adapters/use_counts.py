"""How often each adapter version was asked for lately. Integers only; knows no rows, bytes or clocks.

Every count is halved once there were 16 uses for each version kept. So a count tells of the recent past: what was
popular once gives way, and a version that was not used for long is forgotten. Counts outlive eviction; a popular
version that had to go is known again at once.
"""

from adapters.adapter_ref import AdapterVersion

_USES_PER_VERSION = 16  # with popularity that moves, 8 to 32 find within 1 % as many versions in place


class UseCounts:
    def __init__(self) -> None:
        self._counts: dict[AdapterVersion, int] = {}  # none is 0
        self._num_uses = 0  # since the last halving

    def of(self, version: AdapterVersion) -> int:
        return self._counts.get(version, 0)

    def add(self, version: AdapterVersion, *, num_kept: int) -> None:
        """One more use; `num_kept` is how many versions the counts are to choose among."""
        self._counts[version] = self.of(version) + 1
        self._num_uses += 1
        if self._num_uses >= _USES_PER_VERSION * max(num_kept, 1):
            self._num_uses = 0
            self._counts = {each: count // 2 for each, count in self._counts.items() if count > 1}

    def check_integrity(self) -> None:
        assert all(count > 0 for count in self._counts.values()), "a version without uses is counted"
