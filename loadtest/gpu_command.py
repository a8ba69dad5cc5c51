"""`python -m loadtest gpu PART… --out FOLDER`: its arguments. Measures this machine's GPU; exits 1 when a check fails.

Parts: `check` (tests on the device), `kernels` (each operation against reference and floor), `steps` (decode and
prefill of whole models, by adapters), `serving` (the engine's step, host included), `profile` (the kernels of one
decode step). Each call is to stay within eight minutes on a Hopper: `check kernels`, then `steps` by `--models`.
"""

# What measures is imported only when it is asked for: it brings torch, which the commands over HTTP do not need.

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

HELP = "operations, steps and the engine on this machine's GPU, in this process"
PARTS = ("check", "kernels", "steps", "serving", "profile")

_MEASURING = "loadtest.gpu.measure"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all, if none is named")
    parser.add_argument(
        "--models", default="llama-3.1-8b,qwen3-4b,qwen3-0.6b", help="of those in loadtest/gpu/models.py"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=512, help="tokens behind each decode row")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, once each: does the script run?")
    parser.add_argument("--out", type=Path, default=Path("results"))


def run(argv: Sequence[str]) -> int:
    """The command alone, without the others' modules."""
    parser = argparse.ArgumentParser(prog="python -m loadtest gpu")
    add_arguments(parser)
    return main(parser.parse_args(argv))


def main(arguments: argparse.Namespace) -> int:
    status: int = importlib.import_module(_MEASURING).measure(arguments)
    return status
