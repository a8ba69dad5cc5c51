"""The command `loramux`: finds the command, turns what it raises into one line and a status.

Exit status: 0 done, 1 refused or failed, 2 mistyped. Every flag has an environment name: --max-num-seqs is
LORAMUX_MAX_NUM_SEQS. Commands are imported when they are called, so that `loramux adapters ls` does not wait for torch.
"""

import sys
from importlib.metadata import version

from cyclopts import App, CycloptsError
from cyclopts.config import Env
from rich.console import Console

from server import process_start as process_start  # first of the heavy chain: notes the time
from server.cli_failure import CommandFailed

app = App(
    name="loramux",
    help="Serve many LoRA adapters, unmerged, on one resident base model.",
    version=lambda: version("loramux"),
    config=Env("LORAMUX_", command=False),
)
app.command(
    "server.cli_serve:serve_command", name="serve", help="Serve MODEL and its adapters over HTTP until SIGTERM."
)
app.command("server.cli_check:check_command", name="check", help="Say whether the adapter in FOLDER would be served.")
app.command(
    "server.cli_convert:convert_command", name="convert", help="Turn an adapter of another kind into a PEFT folder."
)
adapters_app = App(name="adapters", help="List, load, move and unload the adapters of a running server.")
app.command(adapters_app)
for _name, _function, _help in (
    ("ls", "list_command", "Show the adapters a server has."),
    ("load", "load_command", "Load an adapter into a running server."),
    ("upload", "upload_command", "Send an adapter to a running server and load it there."),
    ("unload", "unload_command", "Take an adapter's name away."),
    ("describe", "describe_command", "Show everything about one adapter."),
    ("pin", "pin_command", "Keep an adapter in host memory."),
    ("unpin", "unpin_command", "Let an adapter leave host memory."),
    ("alias", "alias_command", "Show, make, move or remove an alias."),
    ("rollback", "rollback_command", "Let a name stand for what it stood for before."),
    ("watch", "watch_command", "Show adapters as they change."),
):
    adapters_app.command(f"server.cli_adapters:{_function}", name=_name, help=_help)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command; ends the process with the status."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run one command; its exit status."""
    try:
        status = app(arguments, exit_on_error=False, result_action="return_value")
    except CycloptsError:
        return 2
    except CommandFailed as error:
        Console(stderr=True).print(f"loramux: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    return status if isinstance(status, int) else 0
