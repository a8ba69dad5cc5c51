"""`loramux serve`: from what was typed to a running server. Knows the flags' meaning only through ServeOptions."""

import logging
from pathlib import Path

from rich.console import Console

import adapters
from server.cli_failure import CommandFailed
from server.cli_options import ServeOptions
from server.default_model import ModelUnavailable
from server.engine.base_model import ModelRefused
from server.serve import StartupRefused, serve


def serve_command(model: str | None = None, *, options: ServeOptions | None = None) -> None:
    """Serve MODEL and its adapters over HTTP until SIGTERM, then finish what is running.

    Parameters
    ----------
    model
        A Hugging Face model folder or a hub id. Without it the installed SmolLM2-135M-Instruct is served, with the
        sample adapters that ship.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("server").setLevel(logging.INFO)
    config = (options or ServeOptions()).config(model, sample_adapters())
    try:
        serve(config, Console())
    except (StartupRefused, ModelUnavailable, ModelRefused) as error:
        raise CommandFailed(str(error)) from error


def sample_adapters() -> list[tuple[str, Path]]:
    """Every adapter that ships, by the name of its folder."""
    folders = sorted(Path(adapters.__file__).parent.glob("samples/*/adapter_config.json"))
    return [(config.parent.name, config.parent) for config in folders]
