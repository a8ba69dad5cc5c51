"""An event loop whose clock stands still while there is work and jumps to the next timer when there is none.

Tests of waits run at once and always the same way. Where nothing is left that could ever wake anybody it says so, and
does not hang.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class NobodyWakes(Exception):
    """All tasks wait, and no timer runs."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual_now = 0.0
        super().__init__()

    def time(self) -> float:
        return self._virtual_now

    def _run_once(self) -> None:
        if not self._ready and not self._stopping:
            timers = [timer.when() for timer in self._scheduled if not timer.cancelled()]
            if not timers:
                raise NobodyWakes
            self._virtual_now = max(self._virtual_now, min(timers))
        super()._run_once()


def run(main: Coroutine[Any, Any, Result]) -> Result:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
