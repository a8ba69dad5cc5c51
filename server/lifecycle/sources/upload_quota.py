"""How much of the quota uploads take: what is kept, as it was last counted, and what is being received.

Each upload has a share and takes from the quota before it writes, so that both together never pass it; what another
process keeps in the same folder is seen at the next count. Used from the event loop and from threads. Knows no files.
"""

import threading
from collections.abc import Callable


class UploadQuota:
    """`count` says how many bytes are kept; it blocks and may raise."""

    def __init__(self, num_bytes: int, count: Callable[[], int]) -> None:
        self.num_bytes = num_bytes
        self._count = count
        self._lock = threading.Lock()  # of the two numbers, never held while something blocks
        self._kept = 0
        self._receiving = 0

    def recount(self) -> None:
        """Blocks. Nothing may be kept meanwhile by this process, or it would not be counted."""
        kept = self._count()
        with self._lock:
            self._kept = kept

    @property
    def is_passed(self) -> bool:
        """By what another process kept."""
        with self._lock:
            return self._kept + self._receiving > self.num_bytes

    def take(self, num_bytes: int) -> bool:
        """For what is about to be received. False, and nothing is taken: it does not fit, as far as is known."""
        with self._lock:
            if self._kept + self._receiving + num_bytes > self.num_bytes:
                return False
            self._receiving += num_bytes
            return True

    def give_back(self, num_bytes: int, *, kept: int = 0) -> None:
        """So much is not being received any more; of that, `kept` bytes are kept now."""
        with self._lock:
            self._receiving -= num_bytes
            self._kept += kept


class QuotaShare:
    """What one upload has taken; `give_back` must be called in the end."""

    def __init__(self, quota: UploadQuota) -> None:
        self._quota = quota
        self._num_bytes = 0

    def take(self, num_bytes: int) -> bool:
        """As UploadQuota.take."""
        has_taken = self._quota.take(num_bytes)
        self._num_bytes += num_bytes if has_taken else 0
        return has_taken

    def give_back(self, *, kept: int = 0) -> None:
        """All of it; again does nothing."""
        num_bytes, self._num_bytes = self._num_bytes, 0
        self._quota.give_back(num_bytes, kept=kept)
