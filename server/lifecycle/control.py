"""What reconcilers call to change the adapters of a server, and what they want of it. Knows nothing of how it is done.

Every name has one owner (`managed_by`): who asked for it first. A watched folder and a declarative file take away only
names of their own, so that what was loaded over HTTP outlives both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.lifecycle.catalogue_records import AliasTarget

API_OWNER = "api"
START_OWNER = "start"  # the command line named it
FOLDER_OWNER = "folder"
FILE_OWNER = "file"
MISS_OWNER = "miss"  # loaded because a request named it; whoever names it on purpose takes it over


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedAdapter:
    """What a name is to stand for. `ttl` is seconds from now on after which the name is taken away; a higher `priority`
    is evicted later."""

    name: str
    source: str
    pin: bool = False
    ttl: float | None = None
    priority: int = 0
    load_inplace: bool = True
    managed_by: str = API_OWNER


class AdapterControl(Protocol):
    """Owned by the event loop. Changes are durable when the call returns."""

    async def apply(self, wanted: WantedAdapter) -> None:
        """Load, replace, or change the settings of `wanted.name`; returns when done.

        The source is read even when the record already names it, since its bytes may be others now. A failure leaves
        what the name stood for as it was. Raises AdapterError; AdapterAlreadyLoaded when the name has another owner
        than `wanted.managed_by` and a reconciler asks.
        """

    async def remove(self, name: str) -> None:
        """Take the name away; requests under way finish. Raises AdapterNotFound."""

    def managed(self, owner: str) -> Mapping[str, WantedAdapter]:
        """The adapters whose record says managed_by == owner, failed ones included, as they were last applied."""

    def wanted(self, name: str) -> WantedAdapter | None:
        """As `managed`, of one name, whoever manages it."""

    def owner_of(self, name: str) -> str | None:
        """Who manages the adapter or the alias of that name; None when there is neither."""

    async def put_alias(self, name: str, targets: Sequence[AliasTarget], *, managed_by: str = API_OWNER) -> None:
        """Make or move an alias in one step; a target's version may be 8 or more digits of one that is kept.

        Raises AdapterError; AdapterNotFound when a target is not there.
        """

    async def remove_alias(self, name: str) -> None:
        """Raises AdapterNotFound."""

    def aliases_managed(self, owner: str) -> Mapping[str, Sequence[AliasTarget]]:
        """The aliases whose record says managed_by == owner."""
