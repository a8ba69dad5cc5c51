"""From what a request names to a lease on an adapter that is in memory, as long as its client is there to wait for it.

Knows nothing of prompts, of what is generated, or of how adapters come into memory.
"""

import asyncio

from starlette.types import Receive

from adapters.adapter_ref import Lease
from server.api.context import ServerContext
from server.api.disconnect import run_while_connected
from server.errors import ModelNotFound

_REVOKED = "The adapter of this request was deleted with mode=abort before the request was finished."


async def lease_adapter(context: ServerContext, model: str, key: str | None, receive: Receive) -> Lease | None:
    """A lease on what `model` names, None for the base; a name that is being loaded is waited for. Raises
    ModelNotFound, AdapterNotReady, AdapterFailed, ClientGone.
    """
    try:
        return context.adapters.acquire(model, key)
    except ModelNotFound:
        await run_while_connected(receive, _until_found(context, model, key))
        return context.adapters.acquire(model, key)


async def _until_found(context: ServerContext, model: str, key: str | None) -> None:
    """Holds nothing in the end, lest a client that leaves at this very moment leaves a lease behind."""
    lease = await context.adapters.resolve(model, key)
    if lease is not None:
        lease.release()


async def until_ready(context: ServerContext, lease: Lease | None, receive: Receive) -> None:
    """The leased version is in host memory when this returns, and stays. Raises what reading it raises,
    AdapterNotReady, QueueFull, ClientGone, and ModelNotFound once the lease is revoked.
    """
    refuse_revoked(lease)
    if lease is None or context.adapters.is_ready(lease):  # without a task: nearly every request comes this way
        await context.adapters.ready(lease)
    else:
        await run_while_connected(receive, _ready_or_revoked(context, lease))
    refuse_revoked(lease)


async def _ready_or_revoked(context: ServerContext, lease: Lease) -> None:
    reading = asyncio.create_task(context.adapters.ready(lease))

    def stop() -> None:
        reading.cancel()

    lease.on_revoked = stop
    try:
        await asyncio.wait({reading})
    finally:
        lease.on_revoked = None
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)  # it counts on the lease until it has ended
    if not lease.is_revoked:
        reading.result()


def refuse_revoked(lease: Lease | None) -> None:
    if lease is not None and lease.is_revoked:
        raise ModelNotFound(_REVOKED, param="model")
