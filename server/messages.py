"""What crosses from the event loop to the engine thread: plain frozen dataclasses, so it may become a process."""

from concurrent.futures import Future
from dataclasses import dataclass

from adapters.adapter_ref import AdapterVersion
from adapters.lora_model import LoRAModel
from server.engine.request import Request


@dataclass(frozen=True, slots=True)
class AddRequest:
    request: Request


@dataclass(frozen=True, slots=True)
class AbortRequest:
    request_id: str


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Take a checked adapter into host memory; `done` resolves, or holds the AdapterError."""

    model: LoRAModel
    done: "Future[None]"


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    version: AdapterVersion
    done: "Future[None]"


@dataclass(frozen=True, slots=True)
class CheckIntegrity:
    done: "Future[None]"


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Leave the loop after this message; requests still live end with an abort."""


Message = AddRequest | AbortRequest | LoadAdapter | UnloadAdapter | CheckIntegrity | Shutdown
