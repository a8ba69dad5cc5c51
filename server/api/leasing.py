"""From what a request names to leases on adapters that are in memory, as long as its client is there to wait for them.

All adapters of a request are leased or none, and wait together. Knows nothing of prompts, of what is generated, or of
how adapters come into memory.
"""

import asyncio
from collections.abc import Sequence

from starlette.types import Receive

from adapters.adapter_ref import Lease
from server.api.adapter_choice import MAX_WEIGHT, AdapterChoice, Reading
from server.api.adapter_hold import AdapterHold, HeldAdapter, canonical
from server.api.context import ServerContext
from server.api.disconnect import run_while_connected
from server.errors import BadRequest, ModelNotFound

_REVOKED = "The adapter of this request was deleted with mode=abort before the request was finished."


async def hold_adapters(
    context: ServerContext, choice: AdapterChoice, key: str | None, receive: Receive
) -> AdapterHold:
    """Leases on all that `choice` names; names that are being loaded are waited for. Raises ModelNotFound, BadRequest,
    AdapterNotReady, AdapterFailed, ClientGone; then nothing is held.
    """
    _check_base(context, choice, key)
    try:
        return _hold(context, choice, key)
    except ModelNotFound:
        await run_while_connected(receive, _until_found(context, choice, key))
        return _hold(context, choice, key)


def _check_base(context: ServerContext, choice: AdapterChoice, key: str | None) -> None:
    if choice.base is None:
        return
    lease = context.adapters.acquire(choice.base, key)
    if lease is not None:
        lease.release()
        raise BadRequest(
            f"'model' names an adapter and '{choice.param}' names adapters, too; let 'model' name the base model.",
            param="model",
        )


def _hold(context: ServerContext, choice: AdapterChoice, key: str | None) -> AdapterHold:
    taken: list[HeldAdapter] = []
    try:
        is_composed = len(choice.parts) > 1 or choice.base is not None
        for readings in choice.parts:
            reading, lease = _acquire(context, readings, key)
            is_composed = is_composed or reading.weight is not None
            if lease is not None:
                taken.append(HeldAdapter(lease, 1.0 if reading.weight is None else reading.weight))
            elif is_composed:
                raise BadRequest(_names_the_base(choice), param=choice.param)
            _check_weight(reading, choice)
        return AdapterHold(canonical(taken), is_composed=is_composed)
    except BaseException:
        for held in taken:
            held.lease.release()
        raise


def _acquire(context: ServerContext, readings: Sequence[Reading], key: str | None) -> tuple[Reading, Lease | None]:
    """The first way to read it that leads to something, and its lease. Raises the last way's ModelNotFound."""
    for reading in readings[:-1]:
        try:
            return reading, context.adapters.acquire(reading.name, key)
        except ModelNotFound:
            if context.adapters.expects(reading.name):
                raise
    return readings[-1], context.adapters.acquire(readings[-1].name, key)


def _check_weight(reading: Reading, choice: AdapterChoice) -> None:
    if reading.weight is not None and abs(reading.weight) > MAX_WEIGHT:
        raise BadRequest(
            f"'{choice.param}' gives the weight {reading.weight:g}; the limit is ±{MAX_WEIGHT:g}.", param=choice.param
        )


def _names_the_base(choice: AdapterChoice) -> str:
    return f"'{choice.param}' names the base model among adapters; it answers with every adapter and has no weight."


async def _until_found(context: ServerContext, choice: AdapterChoice, key: str | None) -> None:
    """Waits for all names at once; raises what the first of them that fails does. Holds nothing in the end, lest a
    client that leaves at this very moment leaves a lease behind."""
    finding = [asyncio.create_task(_find(context, readings, key)) for readings in choice.parts]
    try:
        await asyncio.wait(finding, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in finding:
            task.cancel()
        ends = await asyncio.gather(*finding, return_exceptions=True)
    for end in ends:
        if end is not None and not isinstance(end, asyncio.CancelledError):
            raise end


async def _find(context: ServerContext, readings: Sequence[Reading], key: str | None) -> None:
    """What has a weight behind it is looked for without it first, unless that whole name is on its way already."""
    if context.adapters.expects(readings[0].name):
        readings = readings[:1]
    for reading in readings[:0:-1]:
        try:
            _give_back(await context.adapters.resolve(reading.name, key))
            return
        except ModelNotFound:
            pass
    try:
        _give_back(await context.adapters.resolve(readings[0].name, key))
    except ModelNotFound:
        _give_back(context.adapters.acquire(readings[-1].name, key))  # its message is the one that helps


def _give_back(lease: Lease | None) -> None:
    if lease is not None:
        lease.release()


async def until_ready(context: ServerContext, hold: AdapterHold, receive: Receive) -> None:
    """The leased versions are in host memory when this returns, all of them, and stay. Raises what reading them raises,
    AdapterNotReady, AdapterCapacity, QueueFull, ClientGone, and ModelNotFound once a lease is revoked.
    """
    refuse_revoked(hold)
    if all(map(context.adapters.is_ready, hold.leases)):  # without a task: nearly every request comes this way
        await context.adapters.ready_all(hold.leases)
    else:
        await run_while_connected(receive, _ready_or_revoked(context, hold))
    refuse_revoked(hold)


async def _ready_or_revoked(context: ServerContext, hold: AdapterHold) -> None:
    reading = asyncio.create_task(context.adapters.ready_all(hold.leases))

    def stop() -> None:
        reading.cancel()

    hold.on_revoked(stop)
    try:
        await asyncio.wait({reading})
    finally:
        hold.on_revoked(None)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)  # it counts on the leases until it has ended
    if not hold.is_revoked:
        reading.result()


def refuse_revoked(hold: AdapterHold) -> None:
    if hold.is_revoked:
        raise ModelNotFound(_REVOKED, param="model")
