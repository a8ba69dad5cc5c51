"""The real server, killed while it loads: what it acknowledged over HTTP is served after the next start."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters.module_names import linears_of
from tests.adapters.hostile import healthy
from tests.end_to_end.in_process import free_port, save_tiny_model

KILLS = int(os.environ.get("LORAMUX_SERVER_KILLS", "2"))
PATIENCE = 600.0  # seconds


@contextmanager
def running(model: Path, state: Path) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """A server that is ready; killed in the end."""
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", "--model", str(model), "--state-dir", str(state)]
    server = subprocess.Popen([*command, "--port", str(port)])
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE)
    try:
        _until_ready(client, server)
        yield client, server
    finally:
        server.kill()
        server.wait(PATIENCE)
        client.close()


def _until_ready(client: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    began = time.monotonic()
    while server.poll() is None and time.monotonic() < began + PATIENCE:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    pytest.fail("the server does not start")


def completion(client: httpx.Client, model: str) -> str:
    reply = client.post("/v1/completions", json={"model": model, "prompt": "The", "max_tokens": 6, "temperature": 0})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


@pytest.mark.slow
def test_what_was_acknowledged_is_served_after_a_kill(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, chance = save_tiny_model(tmp_path / "model"), random.Random(0)
    base = linears_of(AutoModelForCausalLM.from_pretrained(model))
    sources = [str(healthy(tmp_path / "sources" / str(seed), base, seed=seed)) for seed in range(3)]
    state, texts = tmp_path / "state", dict[str, str]()
    submitted: set[str] = set()
    for turn in range(KILLS + 1):
        with running(model, state) as (client, server):
            names = {each["name"] for each in client.get("/v1/adapters").json()["data"]}
            assert names == texts.keys() | submitted
            for name, text in texts.items():
                assert completion(client, name) == text, "not the weights that were acknowledged"
            for name in submitted:
                texts[name] = completion(client, name)
                assert texts[name] == texts["first"], "it was accepted from the same source"
            submitted = set()
            if turn == 0:
                body = {"name": "first", "source": sources[0]}
                assert client.post("/v1/adapters?wait=60", json=body).status_code == 201
                texts["first"] = completion(client, "first")
            body = {"name": "moved", "source": sources[1 + turn % 2], "load_inplace": True}
            assert client.post("/v1/adapters?wait=60", json=body).status_code in (200, 201)
            texts["moved"] = completion(client, "moved")
            name = f"submitted-{turn}"
            assert client.post("/v1/adapters", json={"name": name, "source": sources[0]}).status_code == 202
            submitted = {name}
            time.sleep(chance.uniform(0, 0.05))
            server.kill()
