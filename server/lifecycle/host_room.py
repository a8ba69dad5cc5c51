"""The books of host memory: who is in it, for whom room is taken, who is pinned, and who leaves first. Integers only.

Room is taken before a byte is read, so `max_bytes` and `max_adapters` hold for what is in memory and what is on its way
together. Whoever is pinned or held by somebody never leaves; of the others the lowest priority goes first, within it
the one worth least (`lfu_with_ageing`). Knows no event loop, no engine and no files: it says who is to leave, and
somebody else sees to it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from adapters.adapter_ref import AdapterVersion
from adapters.errors import AdapterCapacity
from server.lifecycle.lfu_with_ageing import LFUWithAgeing


class Spare:
    """The residents that may leave, as of one moment: least valuable first, looked up only when somebody asks."""

    def __init__(self, find: Callable[[], list[AdapterVersion]], size_of: Callable[[AdapterVersion], int]) -> None:
        self._find = find
        self._size_of = size_of
        self._found: list[AdapterVersion] | None = None
        self._num_bytes = 0

    def enough_for(
        self, num_bytes: int, num_adapters: int, but: Collection[AdapterVersion] = ()
    ) -> list[AdapterVersion] | None:
        """Take those who together free so much from the list, and none of `but`; None, taking none, when all of them
        would not do."""
        if num_bytes <= 0 and num_adapters <= 0:
            return []
        if self._found is None:
            self._found = self._find()
            self._num_bytes = sum(map(self._size_of, self._found))
        if num_bytes > self._num_bytes or num_adapters > len(self._found):
            return None
        found = [version for version in self._found if version not in but] if but else self._found
        if but and (num_bytes > sum(map(self._size_of, found)) or num_adapters > len(found)):
            return None
        taken = self._needed(found, num_bytes, num_adapters)
        leaving = set(taken)
        self._found = [version for version in self._found if version not in leaving]
        self._num_bytes -= sum(map(self._size_of, taken))
        return taken

    def _needed(self, found: Sequence[AdapterVersion], num_bytes: int, num_adapters: int) -> list[AdapterVersion]:
        """The first that suffice, less those the larger ones among them make needless, the most valuable kept first."""
        taken: list[AdapterVersion] = []
        for version in found:
            if num_bytes <= 0 and num_adapters <= 0:
                break
            taken.append(version)
            num_bytes -= self._size_of(version)
            num_adapters -= 1
        for version in reversed(taken[:]):
            if num_bytes + self._size_of(version) <= 0 and num_adapters + 1 <= 0:
                taken.remove(version)
                num_bytes += self._size_of(version)
                num_adapters += 1
        return taken


class HostRoom:
    """`is_held`: somebody uses the version, so it must stay. `max_adapters` None = as many as the bytes hold."""

    def __init__(self, max_bytes: int, max_adapters: int | None, *, is_held: Callable[[AdapterVersion], bool]) -> None:
        self.max_bytes = max_bytes
        self.max_adapters = max_adapters
        self._is_held = is_held
        self._residents: dict[AdapterVersion, int] = {}  # bytes
        self._reserved: dict[AdapterVersion, int] = {}  # bytes of those on their way
        self._pins: dict[AdapterVersion, int] = {}  # bytes; in memory, on their way, or promised
        self._priorities: dict[AdapterVersion, int] = {}  # of those that have another than 0
        self._worths: LFUWithAgeing[AdapterVersion] = LFUWithAgeing()
        self._num_bytes = 0  # of residents and reserved

    # Who is there.

    def __contains__(self, version: object) -> bool:
        return version in self._residents

    def __len__(self) -> int:
        return len(self._residents)

    @property
    def residents(self) -> tuple[AdapterVersion, ...]:
        return tuple(self._residents)

    @property
    def reserved(self) -> tuple[AdapterVersion, ...]:
        return tuple(self._reserved)

    @property
    def num_bytes(self) -> int:
        """Of residents and of those on their way."""
        return self._num_bytes

    def size_of(self, version: AdapterVersion) -> int:
        """Bytes of a resident; 0 when it is none."""
        return self._residents.get(version, 0)

    def use(self, version: AdapterVersion) -> None:
        """Count a use; one of a version that has left meanwhile counts for nothing."""
        if version in self._residents:
            self._worths.use(version)

    # Coming and going.

    def spare(self) -> Spare:
        return Spare(
            lambda: self._in_order(v for v in self._residents if self._may_leave(v)), self._residents.__getitem__
        )

    def reserve(
        self, version: AdapterVersion, num_bytes: int, spare: Spare, beside: Collection[AdapterVersion] = ()
    ) -> list[AdapterVersion] | None:
        """Take room for a version, and say who had to leave for it; None, changing nothing, when too few may leave, of
        those that are not to be `beside` it."""
        assert version not in self._residents and version not in self._reserved
        victims = spare.enough_for(*self._lacking(num_bytes), beside)
        if victims is None:
            return None
        self._reserved[version] = num_bytes
        if version in self._pins:
            self._pins[version] = num_bytes
        self._num_bytes += num_bytes - sum(self._residents.pop(victim) for victim in victims)
        for victim in victims:
            self._worths.evict(victim)
        return victims

    def resize(self, version: AdapterVersion, num_bytes: int) -> list[AdapterVersion] | None:
        """What room was reserved for takes another number of bytes; as `reserve`."""
        before = self._reserved.pop(version)
        self._num_bytes -= before
        victims = self.reserve(version, num_bytes, self.spare())
        if victims is None:
            self._reserved[version] = before
            self._num_bytes += before
        return victims

    def fits(self, num_bytes: int, beside: Collection[AdapterVersion] = ()) -> bool:
        """`reserve` would find room now."""
        return self.spare().enough_for(*self._lacking(num_bytes), beside) is not None

    def arrive(self, version: AdapterVersion) -> None:
        """What room was reserved for is in memory."""
        self._residents[version] = self._reserved.pop(version)
        self._worths.add(version)

    def release(self, version: AdapterVersion) -> None:
        """What room was reserved for does not come."""
        self._num_bytes -= self._reserved.pop(version)

    def drop(self, version: AdapterVersion) -> int:
        """A resident leaves because nobody wants it; its bytes."""
        num_bytes = self._residents.pop(version)
        self._num_bytes -= num_bytes
        self._worths.forget(version)
        return num_bytes

    def cover(
        self, chosen: set[AdapterVersion], num_bytes: int, num_adapters: int, but: Collection[AdapterVersion] = ()
    ) -> None:
        """Keep in `chosen` the residents whose leaving makes so much room in all: those chosen before, then whoever
        is free to leave, then the least valuable of those in use. Pinned ones and `but` are never chosen.
        """
        chosen.intersection_update(
            v for v in tuple(chosen) if v in self._residents and v not in self._pins and v not in but
        )
        lacking_bytes, lacking_adapters = self._lacking(num_bytes, num_adapters)
        lacking_bytes -= sum(map(self._residents.__getitem__, chosen))
        lacking_adapters -= len(chosen)
        if lacking_bytes <= 0 and lacking_adapters <= 0:
            return
        others = self._in_order(v for v in self._residents if v not in self._pins and v not in chosen and v not in but)
        for version in sorted(others, key=self._is_held):
            if lacking_bytes <= 0 and lacking_adapters <= 0:
                return
            chosen.add(version)
            lacking_bytes -= self._residents[version]
            lacking_adapters -= 1

    def _lacking(self, num_bytes: int, num_adapters: int = 1) -> tuple[int, int]:
        """Bytes and adapters that must leave before so much fits; 0 or less when it fits."""
        lacking_bytes = self._num_bytes + num_bytes - self.max_bytes
        if self.max_adapters is None:
            return lacking_bytes, 0
        return lacking_bytes, len(self._residents) + len(self._reserved) + num_adapters - self.max_adapters

    def _may_leave(self, version: AdapterVersion) -> bool:
        return version not in self._pins and not self._is_held(version)

    def _in_order(self, versions: Iterable[AdapterVersion]) -> list[AdapterVersion]:
        return sorted(versions, key=lambda version: (self._priorities.get(version, 0), *self._worths.worth(version)))

    # What may ever fit, and pins.

    def is_pinned(self, version: AdapterVersion) -> bool:
        return version in self._pins

    def check(self, version: AdapterVersion, num_bytes: int) -> None:
        """Raises AdapterCapacity when the version would not fit even if everybody left who ever may."""
        if num_bytes > self.max_bytes:
            raise AdapterCapacity(
                f"the adapter takes {num_bytes} bytes of host memory and cpu_lora_memory={self.max_bytes} is all there "
                "is; restart with a larger --cpu-lora-memory"
            )
        others = [size for pinned, size in self._pins.items() if pinned != version]
        if num_bytes + sum(others) > self.max_bytes:
            raise AdapterCapacity(
                f"the adapter takes {num_bytes} bytes of host memory, and pinned adapters hold {sum(others)} of "
                f"cpu_lora_memory={self.max_bytes}; unpin one, or restart with a larger --cpu-lora-memory"
            )
        if self.max_adapters is not None and len(others) >= self.max_adapters:
            raise AdapterCapacity(
                f"{len(others)} adapters are pinned, which is max_cpu_loras={self.max_adapters}; unpin one, or restart "
                "with a larger --max-cpu-loras"
            )

    def check_together(self, sizes: Mapping[AdapterVersion, int]) -> None:
        """As `check`, of several versions at one moment."""
        others = [size for pinned, size in self._pins.items() if pinned not in sizes]
        num_bytes = sum(sizes.values())
        if num_bytes + sum(others) > self.max_bytes:
            raise AdapterCapacity(
                f"the {len(sizes)} adapters take {num_bytes} bytes of host memory together, and of "
                f"cpu_lora_memory={self.max_bytes} pinned adapters hold {sum(others)}; name fewer, or restart with a "
                "larger --cpu-lora-memory"
            )
        if self.max_adapters is not None and len(sizes) + len(others) > self.max_adapters:
            raise AdapterCapacity(
                f"{len(sizes)} adapters are named and {len(others)} others pinned, over "
                f"max_cpu_loras={self.max_adapters}; name fewer, or restart with a larger --max-cpu-loras"
            )

    def pin(self, version: AdapterVersion, num_bytes: int, largest_waiting: int = 0) -> None:
        """Promise a version room that nobody takes from it again. Raises AdapterCapacity when the largest adapter
        not pinned, of those here, on their way or waiting, would then never fit, or none at all.
        """
        if version in self._pins:
            return
        self.check(version, num_bytes)
        left = self.max_bytes - sum(self._pins.values()) - num_bytes
        known = [*self._residents.items(), *self._reserved.items()]
        largest = max((size for v, size in known if v != version and v not in self._pins), default=1)
        if left < max(largest, largest_waiting):
            raise AdapterCapacity(
                f"pinning {num_bytes} bytes would leave {left} of cpu_lora_memory={self.max_bytes} to adapters that "
                f"are not pinned, of which the largest takes {max(largest, largest_waiting)}; unpin another, or "
                "restart with a larger --cpu-lora-memory"
            )
        if self.max_adapters is not None and len(self._pins) + 1 >= self.max_adapters:
            raise AdapterCapacity(
                f"{len(self._pins)} of max_cpu_loras={self.max_adapters} adapters are pinned, and one place must stay "
                "free for the others; unpin another, or restart with a larger --max-cpu-loras"
            )
        self._pins[version] = num_bytes

    def unpin(self, version: AdapterVersion) -> None:
        self._pins.pop(version, None)

    def set_priority(self, version: AdapterVersion, priority: int) -> None:
        if priority == 0:
            self._priorities.pop(version, None)
        else:
            self._priorities[version] = priority

    def check_integrity(self) -> None:
        """Raises AssertionError when a limit is passed or two of the tables tell different stories."""
        self._worths.check_integrity()
        assert self._num_bytes == sum(self._residents.values()) + sum(self._reserved.values())
        assert self._num_bytes <= self.max_bytes, "the byte budget is passed"
        assert self.max_adapters is None or len(self._residents) + len(self._reserved) <= self.max_adapters
        assert not self._residents.keys() & self._reserved.keys(), "a version is here and on its way"
        assert set(self._worths) == set(self._residents)
        assert all(size == self._pins.get(v, size) for v, size in self._residents.items()), "a pin promises other bytes"
        assert sum(self._pins.values()) <= self.max_bytes
        assert 0 not in self._priorities.values()
