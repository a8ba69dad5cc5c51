"""A few threads that share out the chunks of one kernel call after another, without OpenMP. Knows no kernel.

Steps of a small model are thousands of kernel calls of some microseconds, with Python between them. OpenMP gives each
thread a fixed part and lets it wait by spinning: one thread that loses its core to the event loop holds up all others
for a scheduler's tick, and the spinning takes that core from the event loop in turn. Here chunks are claimed one by one
from an atomic counter, so whoever runs does the work; who waits gives its core up to anyone who wants it; and between
steps the threads sleep in a semaphore.

A kernel is the address of a C function `void f(int64 arguments, int64 chunk)`, called once per chunk in any order and
on any thread. The caller claims chunks too, and returns when all are done.
"""

import atexit
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from adapters.ops.atomics import call, fetch_add, load, pause, store
from adapters.ops.chunk_kernel import Kernel
from adapters.ops.numba_kernels import entry_point, kernel

# Fields of the shared state, each on a cache line of its own. CLAIM holds (number of chunks << 32 | next chunk): one
# atomic addition gives a thread a chunk of the very call the other half of the word describes.
_LINE = 16  # int64: two cache lines, since processors fetch them in pairs
_CLAIM, _DONE, _CALL, _IS_OPEN, _IS_CLOSED, _WANTED, _SEMAPHORES = (i * _LINE for i in range(7))  # one a helper, last
_NEXT_CHUNK = 0xFFFFFFFF
_SPINS_BEFORE_YIELD = 64  # about a microsecond
_CALL_FIELDS = 3
_MOST_LENT = 2  # cores: as many as threads load adapters; those that read some back wait for the disk, mostly

_sem_init: Any = types.ExternalFunction("sem_init", types.int32(types.int64, types.int32, types.uint32))
_sem_wait: Any = types.ExternalFunction("sem_wait", types.int32(types.int64))
_sem_post: Any = types.ExternalFunction("sem_post", types.int32(types.int64))
_sched_yield: Any = types.ExternalFunction("sched_yield", types.int32())


class KernelArguments:
    """The int64 fields that a kernel reads, at an address that stays."""

    __slots__ = ("address", "fields")

    def __init__(self, fields: npt.NDArray[np.int64]) -> None:
        self.fields = fields
        self.address: int = fields.ctypes.data


class KernelProgram:
    """Kernel calls in order, each with the arguments it had when it was added."""

    def __init__(self) -> None:
        self._arguments: list[KernelArguments] = []
        self._calls: list[tuple[Kernel, int, int]] = []

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, function: Kernel, arguments: KernelArguments, num_chunks: int) -> None:
        copy = KernelArguments(arguments.fields.copy())
        self._arguments.append(copy)
        self._calls.append((function, copy.address, num_chunks))

    @cached_property
    def table(self) -> npt.NDArray[np.int64]:
        """[num_calls, 3] as `_run_all` reads it; nothing is added after it was asked for."""
        return np.array(self._calls, np.int64).reshape(-1, _CALL_FIELDS)

    @cached_property
    def address(self) -> int:
        return self.table.ctypes.data


@numba.njit(nogil=True)
def _work(state):  # type: ignore[no-untyped-def]
    """Claim and run chunks of the call under way until none is left; whether there was one."""
    worked = False
    while True:
        seen = load(state + 8 * _CLAIM)
        if (seen & _NEXT_CHUNK) >= (seen >> 32):
            return worked
        claim = fetch_add(state + 8 * _CLAIM, 1)
        chunk = claim & _NEXT_CHUNK
        if chunk >= (claim >> 32):
            return worked
        # The call cannot end before this chunk is done, so its kernel and arguments stand from here on.
        call(load(state + 8 * _CALL), load(state + 8 * _CALL + 8), chunk)
        fetch_add(state + 8 * _DONE, 1)
        worked = True


@kernel()
def _run(state, function, arguments, num_chunks):  # type: ignore[no-untyped-def]
    """Run all chunks of a call with whoever is awake; alone without a `state`."""
    if state == 0 or num_chunks == 1:
        for chunk in range(num_chunks):
            call(function, arguments, chunk)
        return
    store(state + 8 * _DONE, 0)
    store(state + 8 * _CALL, function)
    store(state + 8 * _CALL + 8, arguments)
    store(state + 8 * _CLAIM, num_chunks << 32)
    _work(state)
    spins = 0
    while load(state + 8 * _DONE) < num_chunks:
        spins += 1
        pause()
        if spins % _SPINS_BEFORE_YIELD == 0:
            _sched_yield()


@kernel()
def _run_all(state, calls, num_calls):  # type: ignore[no-untyped-def]
    """Run calls, int64 [num_calls, 3] of function, arguments and number of chunks, one after the other."""
    for at in range(calls, calls + num_calls * 8 * _CALL_FIELDS, 8 * _CALL_FIELDS):
        _run(state, load(at), load(at + 8), load(at + 16))


@kernel()
def _serve(state, number):  # type: ignore[no-untyped-def]
    """The life of a helping thread: asleep between steps, and while its core is lent; claiming chunks or waiting for
    some within one."""
    while True:
        _sem_wait(state + 8 * (_SEMAPHORES + number * _LINE))
        spins = 0
        while load(state + 8 * _IS_OPEN) != 0 and number < load(state + 8 * _WANTED):
            if _work(state):
                spins = 0
            spins += 1
            pause()
            if spins > _SPINS_BEFORE_YIELD:
                _sched_yield()
        if load(state + 8 * _IS_CLOSED) != 0:
            return


@kernel()
def _open(state, num_helpers, is_open):  # type: ignore[no-untyped-def]
    """Begin or end a step: wake the first helpers, or let all go to sleep."""
    store(state + 8 * _IS_OPEN, is_open)
    if is_open:
        for number in range(num_helpers):
            _sem_post(state + 8 * (_SEMAPHORES + number * _LINE))


@kernel()
def _prepare(state, num_helpers):  # type: ignore[no-untyped-def]
    for number in range(num_helpers):
        _sem_init(state + 8 * (_SEMAPHORES + number * _LINE), np.int32(0), np.uint32(0))


@kernel()
def _close(state, num_helpers):  # type: ignore[no-untyped-def]
    store(state + 8 * _IS_CLOSED, 1)
    for number in range(num_helpers):
        _sem_post(state + 8 * (_SEMAPHORES + number * _LINE))


Watcher = Callable[[Kernel, KernelArguments, int], None]

_watching = threading.local()  # not of one team: what a thread does may be shared out among several


@contextmanager
def watched_kernels(watcher: Watcher) -> Iterator[None]:
    """Tell `watcher` of every kernel that this thread has a team run inside, before it is run."""
    assert getattr(_watching, "watcher", None) is None
    _watching.watcher = watcher
    try:
        yield
    finally:
        _watching.watcher = None


class ThreadTeam:
    """`num_threads` with the caller's. Helpers work for the one thread that is inside `step`; others work alone."""

    def __init__(self, num_threads: int) -> None:
        # Only Linux has semaphores in plain memory; elsewhere the caller works alone.
        self.num_threads = num_threads if sys.platform == "linux" else 1
        int64 = types.int64
        self._memory = np.zeros(_SEMAPHORES + num_threads * _LINE, np.int64)
        self._memory[_WANTED] = num_threads - 1
        self._state = self._memory.ctypes.data
        self._run = entry_point(_run, (int64,) * 4)
        self._run_all = entry_point(_run_all, (int64,) * 3)
        self._owner: int | None = None  # the thread inside `step`
        self._stepping = threading.Lock()
        self._num_lent, self._lending = 0, threading.Lock()
        self._helpers: list[threading.Thread] = []
        if self.num_threads > 1:
            self._start()

    @property
    def _num_helpers(self) -> int:
        return self.num_threads - 1

    def _start(self) -> None:
        int64 = types.int64
        entry_point(_prepare, (int64, int64))(self._state, self._num_helpers)
        serve = entry_point(_serve, (int64, int64))
        self._open = entry_point(_open, (int64, int64, int64))
        self._close = entry_point(_close, (int64, int64))
        for number in range(self._num_helpers):
            thread = threading.Thread(
                target=serve, args=(self._state, number), name=f"kernels-{number + 1}", daemon=True
            )
            thread.start()
            self._helpers.append(thread)
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget_helpers)

    def _forget_helpers(self) -> None:
        """Threads do not come along into a forked process."""
        self._helpers, self._owner = [], None
        self._stepping, self._lending = threading.Lock(), threading.Lock()

    def run(self, function: Kernel, arguments: KernelArguments, num_chunks: int) -> None:
        """Call `function(arguments, chunk)` for every chunk in [0, num_chunks); helpers join in inside `step`."""
        watcher: Watcher | None = getattr(_watching, "watcher", None)
        if watcher is not None:
            watcher(function, arguments, num_chunks)
        self._run(self._shared_state(), function, arguments.address, num_chunks)

    def run_program(self, program: KernelProgram) -> None:
        """Run its calls one after the other, without Python and its lock."""
        self._run_all(self._shared_state(), program.address, len(program))

    def _shared_state(self) -> int:
        """Where helpers look for work, 0 when none would look."""
        return self._state if self._owner is not None and self._owner == threading.get_ident() else 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Keep the helpers awake inside, unless they already are, for this thread or another."""
        if not self._helpers or not self._stepping.acquire(blocking=False):
            yield
            return
        try:
            self._open(self._state, int(self._memory[_WANTED]), 1)
            self._owner = threading.get_ident()
            yield
        finally:
            self._owner = None
            self._open(self._state, self._num_helpers, 0)
            self._stepping.release()

    @contextmanager
    def lent_core(self) -> Iterator[None]:
        """Keep one helper asleep inside, also from within a step, so that the calling thread has its core. More than a
        few at a time share what is lent."""
        self._lend(1)
        try:
            yield
        finally:
            self._lend(-1)

    def _lend(self, more: int) -> None:
        with self._lending:
            self._num_lent += more
            self._memory[_WANTED] = max(0, self._num_helpers - min(self._num_lent, _MOST_LENT))

    def close(self) -> None:
        """End the helping threads after the step under way; the caller can go on alone."""
        with self._stepping:
            helpers, self._helpers = self._helpers, []
            if helpers:
                self._close(self._state, len(helpers))
                for thread in helpers:
                    thread.join()
                atexit.unregister(self.close)


_current: ThreadTeam | None = None


def start_team(num_threads: int) -> ThreadTeam:
    """The process's team, made anew when another number of threads is wanted; cores are the process's to share out."""
    global _current
    if _current is None or _current.num_threads != num_threads:
        if _current is not None:
            _current.close()
        _current = ThreadTeam(num_threads)
    return _current


def current_team() -> ThreadTeam:
    """The process's team; the caller alone when none was started."""
    return start_team(1) if _current is None else _current
