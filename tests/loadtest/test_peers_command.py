"""Which servers a peers run compares: a missing one fails with the way out, unless it was left out by name."""

import argparse
from pathlib import Path

import pytest

from loadtest import peers, peers_command, server_commands
from loadtest.__main__ import main
from loadtest.client import LoadTestFailed
from loadtest.peers import PeersSettings
from loadtest.peers_cells import CELLS
from loadtest.peers_endpoints import LLAMA_CPP, OURS, PEFT, VLLM, Programs, describe, find_programs


def _settings(*arguments: str) -> PeersSettings:
    parser = argparse.ArgumentParser()
    peers_command.add_arguments(parser)
    return peers_command.settings_from(parser.parse_args(arguments))


def test_all_servers_take_part_and_a_whole_run_is_published() -> None:
    settings = _settings()
    assert settings.names == (OURS, LLAMA_CPP, VLLM, PEFT)
    assert (settings.missing, settings.rounds) == ({}, 3)
    assert settings.publish == Path("docs/benchmarks/cpu-peers.md")


def test_a_part_is_published_only_when_asked() -> None:
    assert _settings("--quick").publish is None
    assert _settings("--rounds", "1").publish is None
    assert _settings("--cells", "8x32").publish is None
    assert _settings("--cells", "8x32", "--publish", "here.md").publish == Path("here.md")


def test_peers_left_out_are_remembered() -> None:
    settings = _settings("--without", "vllm", "--without", "peft")
    assert settings.names == (OURS, LLAMA_CPP)
    assert settings.missing == {VLLM: "--without vllm", PEFT: "--without peft"}
    assert _settings("--only", "ours,llama.cpp").names == (OURS, LLAMA_CPP)


def test_our_pairs_need_no_peer() -> None:
    assert _settings("--cells", "own").names == (OURS,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "llama.cpp"), "must name ours"),
        (("--only", "ours,tgi"), "--only tgi"),
        (("--cells", "64x64"), "no cell 64x64"),
        (("--rounds", "0"), "at least 1"),
    ],
)
def test_impossible_selections_are_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _settings(*arguments)


def test_missing_llama_server_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_commands.shutil, "which", lambda _: None)
    monkeypatch.setattr(server_commands.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(LoadTestFailed, match="--without llama.cpp"):
        find_programs((OURS, LLAMA_CPP), Programs())
    assert find_programs((OURS,), Programs()) == Programs()


def test_missing_vllm_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["peers", "--only", "ours,vllm", "--vllm-python", str(tmp_path / "none")]) == 1
    assert "--without vllm" in capsys.readouterr().err


def test_commands_are_shown_without_folders_and_adapters() -> None:
    adapters = [Path(f"/somewhere/a{i}") for i in range(32)]
    ours = describe(server_commands.loramux_command(adapters, 4711), 4711)
    assert ours.endswith("-m server serve --no-samples --port PORT --lora-modules …")
    vllm = describe(server_commands.vllm_command(Path("/v/bin/python"), Path("/m/smol"), adapters, 4711), 4711)
    assert "VLLM_TARGET_DEVICE=cpu" in vllm
    assert "serve smol" in vllm
    assert vllm.endswith("--max-loras 32 --max-lora-rank 16 --lora-modules …")
    loras = [Path(f"/somewhere/{each.name}.gguf") for each in adapters]
    llama = describe(server_commands.llama_server_command(Path("/b/llama-server"), Path("/b.gguf"), loras, 4711), 4711)
    assert llama.startswith("llama-server -m b.gguf --port PORT -np 32 -c 16384")
    assert llama.endswith("--lora-init-without-apply --lora …")
    assert "/" not in ours + vllm + llama


def test_peft_takes_part_in_its_own_cells_only() -> None:
    assert [cell.name for cell in CELLS if cell.peft] == ["32x32"]


def test_the_page_names_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        peers.sys, "argv", ["x", "peers", "--llama-server", "/home/me/bin/llama-server", "--rounds", "3"]
    )
    assert peers.command_line() == "python -m loadtest peers --llama-server llama-server --rounds 3"
