"""Puts the server together and takes it down: model, engine thread, adapters, application, sockets, signals.

The order matters: the port is taken before the model is read, adapters are loaded before the first request is, and on
SIGTERM requests end before connections do. Knows every part, does no work of its own.
"""

import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import uvicorn
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from adapters.errors import AdapterError
from server import process_start, startup_panel
from server.api.app import create_app
from server.api.auth import check_binding
from server.api.context import ServerContext
from server.api.h11_protocol import h11_protocol
from server.async_engine import AsyncEngine
from server.config import HTTPConfig, SchedulerConfig, ServerConfig
from server.default_model import ResolvedModel, resolve_model
from server.engine.base_model import load_base_model
from server.engine.engine import Engine
from server.lifecycle.assembly import AdapterParts, open_adapters
from server.lifecycle.catalogue_errors import CatalogueError
from server.lifecycle.control import MISS_OWNER, START_OWNER, WantedAdapter
from server.lifecycle.sources.source_options import with_options
from server.metrics import Metrics
from server.tokenizer import Tokenizer, TokenizerNotLoaded

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SWITCH_SECONDS = 0.0005
"""How long a thread keeps the interpreter from the engine's: several times a step, while an adapter is read."""
_FLUSH_SECONDS = 5  # for replies already written by the application to reach their clients


class StartupRefused(Exception):
    """The server cannot start as asked; the message says why and what to change."""


class Drainable(Protocol):
    """What shutting down asks of the engine."""

    @property
    def num_live(self) -> int: ...
    async def drain(self, timeout: float) -> bool: ...


class AdapterLoader(Protocol):
    """What starting asks of the adapter service."""

    async def apply(self, wanted: WantedAdapter) -> None: ...
    async def forget_start(self, names: Sequence[str]) -> None: ...
    def owner_of(self, name: str) -> str | None: ...


def serve(config: ServerConfig, console: Console) -> None:
    """Serve until SIGTERM or SIGINT. Raises StartupRefused, ModelUnavailable, ModelRefused."""
    try:
        check_binding(config.http)
        _check_budget(config.engine.scheduler)
    except ValueError as error:
        raise StartupRefused(str(error)) from error
    if not console.is_terminal:
        disable_progress_bar()
    sys.setswitchinterval(_SWITCH_SECONDS)
    with bound_socket(config.http) as sock:
        model = config.engine.model
        resolved = resolve_model(model.model, model.revision, notify=console.print)
        engine, tokenizer = _load_model(config, resolved)
        asyncio.run(_Running(config, resolved, engine, tokenizer, sock, console).run())


def _check_budget(scheduler: SchedulerConfig) -> None:
    """Every running request must get its token in every step, or the last ones would stand still."""
    if scheduler.max_num_batched_tokens < scheduler.max_num_seqs:
        raise ValueError(
            f"--max-num-batched-tokens {scheduler.max_num_batched_tokens} is under --max-num-seqs "
            f"{scheduler.max_num_seqs}, a token for each request of a step; raise the one or lower the other"
        )


def _load_model(config: ServerConfig, resolved: ResolvedModel) -> tuple[Engine, Tokenizer]:
    """The engine, ready to step, and the tokenizer. Raises StartupRefused, ModelRefused."""
    try:
        tokenizer = Tokenizer.load(resolved.folder)
        base = load_base_model(resolved.folder, resolved.name, config.engine.model)
        return Engine(config.engine, base, num_token_ids=tokenizer.max_id + 1), tokenizer
    except (OSError, ValueError, RuntimeError, TokenizerNotLoaded) as error:
        logger.debug("the model could not be loaded", exc_info=True)
        raise StartupRefused(f"{resolved.name} cannot be served from {resolved.folder}: {error}") from error


class _Running:
    """One server from its first event-loop tick to its last."""

    def __init__(
        self,
        config: ServerConfig,
        resolved: ResolvedModel,
        engine: Engine,
        tokenizer: Tokenizer,
        sock: socket.socket,
        console: Console,
    ) -> None:
        self.config = config
        self.names = config.served_model_names or resolved.names
        self.ready_engine = engine
        self.tokenizer = tokenizer
        self.sock = sock
        self.console = console

    async def run(self) -> None:
        """Start every part, serve, and leave nothing running."""
        engine = AsyncEngine(self.ready_engine, self.config.engine.scheduler)
        engine.start()
        try:
            async with AsyncExitStack() as stack:
                stack.push_async_callback(engine.drain, 0)
                await self._serve(engine, await self._context(engine, stack), stack)
        finally:
            await engine.drain(0)

    async def _serve(self, engine: AsyncEngine, context: ServerContext, stack: AsyncExitStack) -> None:
        server = _QuietServer(_uvicorn_config(self.config.http, context))
        stop = _stop_events()
        serving = asyncio.create_task(server.serve(sockets=[self.sock]))
        await _until_started(server, serving)
        self._announce(engine, context)
        await asyncio.wait({serving, asyncio.create_task(stop[0].wait())}, return_when=asyncio.FIRST_COMPLETED)
        await drain(engine, self.config.http.shutdown_timeout, stop[1], self.console)
        context.adapters.events.end()
        server.should_exit = True
        await serving

    async def _context(self, engine: AsyncEngine, stack: AsyncExitStack) -> ServerContext:
        """What the routes work with, its adapters loaded, in the care of the stack."""
        metrics = Metrics(self.names[0], max_adapters=self.config.http.metrics_adapters)
        metrics.set_cache_config(block_size=engine.info.block_size, num_gpu_blocks=engine.info.memory.num_blocks)
        engine.add_observer(metrics.observe_step)
        parts = await self._open_adapters(engine, metrics, stack)
        memory = engine.info.memory
        fixed = {"weights": memory.weights, "kv_cache": memory.kv_cache, "lora_pools": memory.lora_pools}
        metrics.watch_memory(
            lambda: {
                **fixed,
                "lora_extras": engine.stats.num_lora_extra_bytes,
                "cpu_loras": parts.service.host.num_bytes,
            }
        )
        return ServerContext(
            engine=engine,
            tokenizer=self.tokenizer,
            adapters=parts.service,
            uploads=parts.uploads,
            metrics=metrics,
            config=self.config,
            model_name=self.names[0],
        )

    async def _open_adapters(self, engine: AsyncEngine, metrics: Metrics, stack: AsyncExitStack) -> AdapterParts:
        """The adapters of the state folder known, those of the command line loaded, what steers them running."""
        config, lora = self.config.adapters, self.config.engine.lora
        try:
            named = [folder for _, folder in self.config.lora_modules]
            parts = await open_adapters(stack, engine, metrics, config, lora, base_names=self.names, named=named)
            await parts.service.start()
            await load_adapters(parts.service, self.config.lora_modules, samples=self.config.samples)
            steering = parts.reconcilers(config)
        except (OSError, ValueError, AdapterError, CatalogueError) as error:
            raise StartupRefused(f"adapters cannot be served: {error}") from error
        for each in steering:
            task = asyncio.create_task(each.run(), name=type(each).__name__)
            task.add_done_callback(_told_when_it_fails)
            stack.push_async_callback(_cancelled, task)
        return parts

    def _announce(self, engine: AsyncEngine, context: ServerContext) -> None:
        host, port = self.sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        started = startup_panel.Started(
            config=self.config,
            info=engine.info,
            model_name=self.names[0],
            adapters=[info.ref for info in context.adapters.registry.list()],
            url=f"http://{shown}:{port}",
            seconds=time.monotonic() - process_start.BEGAN,
        )
        startup_panel.show(started, self.console)


class _QuietServer(uvicorn.Server):
    """uvicorn, with the signals left to us: it would close connections before their requests are done."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _uvicorn_config(http: HTTPConfig, context: ServerContext) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(context),
        http=h11_protocol(context.metrics.error),
        ws="none",
        lifespan="off",
        h11_max_incomplete_event_size=http.max_header_bytes,
        timeout_graceful_shutdown=_FLUSH_SECONDS,
        access_log=False,
        server_header=False,
        log_level="warning",
    )


@contextmanager
def bound_socket(http: HTTPConfig) -> Iterator[socket.socket]:
    """Take the port before anything slow happens. Not yet listening, so that clients are refused, not kept waiting."""
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((http.host.strip("[]"), http.port))
        except OSError as error:
            raise StartupRefused(
                f"cannot bind {http.host}:{http.port} ({error.strerror or error}); choose another with --port or --host"
            ) from error
        yield sock


async def load_adapters(
    service: AdapterLoader, modules: Sequence[tuple[str, Path]], *, samples: Collection[str] = ()
) -> None:
    """Load every adapter named at start; one that is refused stops the start, as a server without it would mislead.
    What an earlier start named and this one does not is taken away. `samples` leave a name to who has it.
    """
    for name, folder in modules:
        if name in samples and service.owner_of(name) not in (None, START_OWNER, MISS_OWNER):
            logger.info("the sample %s is not loaded: the name is taken", name)
            continue
        try:
            source = with_options(str(folder.absolute()))
            await service.apply(WantedAdapter(name=name, source=source, managed_by=START_OWNER))
        except AdapterError as error:
            raise StartupRefused(f"adapter {name!r} from {folder} cannot be served: {error}") from error
    await service.forget_start([name for name, _ in modules])


def _told_when_it_fails(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s ended: what it follows changes nothing any more", task.get_name(), exc_info=error)


async def _cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait({task})


async def _until_started(server: uvicorn.Server, serving: "asyncio.Task[None]") -> None:
    while not server.started:
        if serving.done():
            serving.result()
            raise StartupRefused("the HTTP server ended before it started")
        await asyncio.sleep(0.01)


def _stop_events() -> tuple[asyncio.Event, asyncio.Event]:
    """Set by the first and by the second SIGTERM or SIGINT."""
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (second if first.is_set() else first).set()

    for each in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(each, on_signal)
    return first, second


async def drain(engine: Drainable, timeout: float, at_once: asyncio.Event, console: Console) -> None:
    """Let running requests finish within `timeout` seconds; a second signal ends them at once."""
    if engine.num_live:
        console.print(f"Finishing {engine.num_live} requests within {timeout:g} s; signal again to end them now")
    draining = asyncio.create_task(engine.drain(timeout))
    hurried = asyncio.create_task(at_once.wait())
    await asyncio.wait({draining, hurried}, return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    if not draining.done():
        await engine.drain(0)
    await draining
