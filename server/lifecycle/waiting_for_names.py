"""A request names an adapter that is not there yet: being loaded, or to be had from where such names are looked for.

Waits for the load up to a deadline; remembers for a while what could not be had, so that a flood of requests for it
asks nobody. Knows nothing of versions and leases.
"""

import time
from collections.abc import Callable, Mapping
from http import HTTPStatus

from adapters.errors import AdapterError, AdapterNotFound
from adapters.untrusted_json import shown
from server.errors import QueueFull
from server.lifecycle.adapter_loader import AdapterLoader
from server.lifecycle.catalogue_records import AdapterRecord
from server.lifecycle.control import MISS_OWNER, WantedAdapter
from server.lifecycle.errors import AdapterFailed, AdapterLoadCancelled, AdapterNotReady
from server.lifecycle.load_job import LoadJob, wait_at_most
from server.lifecycle.sources.source_template import SourceTemplate

MISS_SECONDS = 30.0  # for which a miss is remembered
_MAX_MISSES = 4096
_MAX_LOOKUPS = 64  # under way at once: a flood of names must not queue up for the network


class WaitingForNames:
    """`template` None: only what is registered or being loaded is found. `check_name` raises AdapterError for a name
    that no adapter may have here.
    """

    def __init__(
        self,
        loader: AdapterLoader,
        records: Mapping[str, AdapterRecord],
        template: SourceTemplate | None,
        *,
        check_name: Callable[[str], None],
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loader = loader
        self._records = records
        self._template = template
        self._check_name = check_name
        self._timeout = timeout
        self._clock = clock
        self._misses: dict[str, float] = {}  # name → until when it is not asked for again

    async def wait(self, name: str) -> bool:
        """True when `name` was loaded meanwhile; False when nobody is loading it and it is nowhere to be found.

        Raises AdapterNotReady when it takes too long, AdapterFailed when it cannot be loaded, and what `submit` raises.
        """
        job = self._loader.jobs.get(name) or await self._look_for(name)
        if job is None:
            self._refuse_failed(name)
            return False
        try:
            load = await wait_at_most(job, self._timeout, is_asker=False)
        except AdapterLoadCancelled:  # the name was taken away
            return False
        except AdapterNotFound:
            self._remember(name)
            return False
        except AdapterError as error:
            if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:  # it may well work later: not a miss
                raise AdapterNotReady(f"The adapter `{shown(name)}` cannot be had now ({error.code}).") from error
            self._remember(name)
            raise AdapterFailed(f"The adapter `{shown(name)}` could not be loaded ({error.code}).") from error
        if load is None:
            raise AdapterNotReady(f"The adapter `{shown(name)}` is still being loaded after {self._timeout:g} seconds.")
        return True

    async def _look_for(self, name: str) -> LoadJob | None:
        """Begin to load a name that nobody registered, from where the template says."""
        if self._template is None or name in self._records or self._clock() < self._misses.get(name, 0.0):
            return None
        try:
            self._check_name(name)
            source = self._template.source_for(name)
            if source is None:
                return None
            if self._loader.num_of(MISS_OWNER) >= _MAX_LOOKUPS:
                raise QueueFull(f"{_MAX_LOOKUPS} adapters that nobody registered are being looked for; retry later")
            wanted = WantedAdapter(name=name, source=source, load_inplace=False, managed_by=MISS_OWNER)
            return await self._loader.submit(wanted)
        except AdapterError:  # no name an adapter could have there
            self._remember(name)
            return None

    def _refuse_failed(self, name: str) -> None:
        record = self._records.get(name)
        if record is not None and record.version is None and record.failure is not None:
            raise AdapterFailed(f"The adapter `{name}` could not be loaded ({record.failure[0]}).")

    def _remember(self, name: str) -> None:
        now = self._clock()
        if len(self._misses) >= _MAX_MISSES:
            self._misses = {n: until for n, until in self._misses.items() if until > now}
        if len(self._misses) < _MAX_MISSES:
            self._misses[name] = now + MISS_SECONDS
