"""`python -m loadtest COMMAND`: runs the command.

`gpu` is to run where there is torch and little else, so what the other commands need is imported only for them.
"""

import importlib
import sys
from collections.abc import Sequence

from loadtest import gpu_command


def main(argv: Sequence[str] | None = None) -> int:
    typed = sys.argv[1:] if argv is None else argv
    if list(typed[:1]) == ["gpu"]:
        return gpu_command.run(typed[1:])
    status: int = importlib.import_module("loadtest.commands").main(typed)
    return status


if __name__ == "__main__":
    sys.exit(main())
