"""What an adapter is called and what it is: names, versions, and the lease that keeps a version alive.

A *name* is what a client sends; it may be moved to other bytes at any time. A *version* is the SHA-256 over the
canonical config and the weight bytes; it never changes. Everything below the front door (row ranges, prefix-cache
keys, metrics, logs) speaks versions only. This module knows nothing of files, tensors or requests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NewType

AdapterVersion = NewType("AdapterVersion", str)
"""SHA-256 (64 hex digits) over canonical config and weight bytes."""


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One adapter applied to a request with a weight: y += weight · B(A x). A request holds 0, 1 or k of these, no two
    of one version, sorted by version.
    """

    version: AdapterVersion
    weight: float = 1.0
    active_from: int = 0  # the first token of the sequence that it acts on: aLoRA


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """A registered adapter as the front door sees it: the name it was asked by and the version it resolved to."""

    name: str
    version: AdapterVersion
    source: str
    lora_rank: int
    num_bytes: int
    modules: tuple[str, ...]

    @property
    def use(self) -> AdapterUse:
        return AdapterUse(self.version)


class Lease:
    """A hold on one version, taken when a name is resolved and given back exactly once.

    While any lease on a version is open its weights stay where requests can use them, whatever happens to its name.
    `release` is idempotent, so it may stand in a `finally` beside another path that released already. `revoke` asks
    the holder to end what it does with the version and then release; it does so by `on_revoked`.
    """

    __slots__ = ("_give_back", "is_revoked", "on_revoked", "ref")

    def __init__(self, ref: AdapterRef, give_back: "Callable[[Lease], None]") -> None:
        self.ref = ref
        self.is_revoked = False
        self.on_revoked: Callable[[], object] | None = None
        self._give_back: Callable[[Lease], None] | None = give_back

    @property
    def is_open(self) -> bool:
        return self._give_back is not None

    def release(self) -> None:
        give_back, self._give_back = self._give_back, None
        self.on_revoked = None
        if give_back is not None:
            give_back(self)

    def revoke(self) -> None:
        self.is_revoked = True
        if self.on_revoked is not None:
            self.on_revoked()
