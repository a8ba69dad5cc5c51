"""What was measured as a page of Markdown: what must hold, the figures behind it, and what they were taken on."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.peers_bytes import Bandwidth, StepBytes
from loadtest.peers_cells import Cell, Pair
from loadtest.peers_endpoints import OURS, PEERS
from loadtest.peers_measure import Measured
from loadtest.peers_requirements import DecodeLimit, Requirement, first_token_ms, rate
from loadtest.peers_rounds import Results

_VERDICTS = {True: "held", False: "**missed**", None: "not measured"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the figures were taken on and with."""

    when: str
    command: str
    machine: str
    load_before: float
    rounds: int
    output_tokens: int
    versions: dict[str, str]
    commands: dict[str, str]
    missing: dict[str, str]  # peer → why it was not measured
    bandwidth: Bandwidth | None
    step_bytes: StepBytes


def page(
    setting: Setting,
    results: Results,
    cells: Sequence[Cell],
    pairs: Sequence[Pair],
    limits: Sequence[DecodeLimit],
    required: Sequence[Requirement],
) -> str:
    sections = [
        "# Beside the peers on a CPU",
        _introduction(setting),
        "## What must hold\n\n" + _required(required),
        *(["## Output tokens a second\n\n" + _cells(results, cells)] if cells else []),
        *(["## Ours over ours\n\n" + _pairs(results, pairs)] if pairs else []),
        *(["## Decode beside its bytes\n\n" + _limits(limits, setting)] if limits else []),
        "## How it was taken\n\n" + _how(setting),
    ]
    return "\n\n".join(sections) + "\n"


def _introduction(setting: Setting) -> str:
    missing = "".join(f" {name} was left out: {why}." for name, why in setting.missing.items())
    return (
        f"{setting.when}, {setting.machine}, load {setting.load_before:.1f} before. SmolLM2-135M-Instruct in "
        "bfloat16, distinct adapters of rank 16 on all seven linears, prompts of 64 words, "
        f"{setting.output_tokens} output tokens, greedy, every server sent the same requests; medians of "
        f"{setting.rounds} rounds in turns.{missing}\n\n"
        f"    {setting.command}"
    )


def _required(required: Sequence[Requirement]) -> str:
    lines = ["| what | bound | measured | | |", "|---|---:|---:|---|---|"]
    for each in required:
        bound = f"{'at most' if each.at_most else 'at least'} {each.bound:g}"
        value = "–" if each.value is None else f"{each.value:.2f}"
        lines.append(f"| {each.what} | {bound} | {value} | {_VERDICTS[each.held]} | {each.note} |")
    return "\n".join(lines)


def _cells(results: Results, cells: Sequence[Cell]) -> str:
    lines = ["| load | server | output tok/s | rounds | TTFT p50 ms | ITL p50 ms |", "|---|---|---:|---|---:|---:|"]
    for cell in cells:
        for name in (OURS, *PEERS):
            if found := results.cells.get((cell.name, name)):
                itl = statistics.median(each.figures.itl_ms.p50 for each in found)
                ttft = statistics.median(map(first_token_ms, found))
                lines.append(f"| {cell.title} | {name} | {_rates(found)} | {ttft:.0f} | {itl:.1f} |")
    return "\n".join(lines) + _proof([each for found in results.cells.values() for each in found])


def _pairs(results: Results, pairs: Sequence[Pair]) -> str:
    lines = ["| pair | side | output tok/s | rounds |", "|---|---|---:|---|"]
    for pair in pairs:
        for side in ("over", "under"):
            if found := results.pairs.get((pair.name, side)):
                lines.append(f"| {pair.title} | {side} | {_rates(found)} |")
    return "\n".join(lines) + _proof([each for found in results.pairs.values() for each in found])


def _rates(found: Sequence[Measured]) -> str:
    rates = [rate(each) for each in found]
    return f"{statistics.median(rates):.1f} | {', '.join(f'{each:.1f}' for each in rates)}"


def _proof(found: Sequence[Measured]) -> str:
    proofs = [each.figures.proof for each in found if each.figures.proof is not None]
    return f"\n\nOur mix was proven each of {len(proofs)} times; the last: {proofs[-1]}." if proofs else ""


def _limits(limits: Sequence[DecodeLimit], setting: Setting) -> str:
    lines = [
        "| rows = D | base tok/s | LoRA tok/s | eta | phi | eta/phi | rho | rho of the base | mean context |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for each in limits:
        lines.append(
            f"| {each.rows} | {each.base_rate:.1f} | {each.lora_rate:.1f} | {each.eta:.3f} | {each.phi:.3f} | "
            f"{each.eta / each.phi:.3f} | {each.rho_lora:.2f} | {each.rho_base:.2f} | {each.mean_context:.0f} |"
        )
    size = setting.step_bytes
    lines.append(
        f"\nCounted: W {size.base / 1e6:.1f} MB of the base, S_a {size.adapter / 1e6:.2f} MB an adapter, KV "
        f"{size.kv_per_token / 1e3:.1f} kB a token of context. phi = (W + KV) / (W + KV + D · S_a); rho = those bytes "
        f"over the read bandwidth, over the time of a step. Measured in this run: {setting.bandwidth}. Rates are of "
        "the time in which all rows decode, by the client's clock."
    )
    return "\n".join(lines)


def _how(setting: Setting) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in setting.versions.items())
    commands = "\n".join(f"- {name}: `{command}`" for name, command in setting.commands.items())
    return (
        f"Versions: {versions}.\n\nOne server runs at a time, the others are stopped (SIGSTOP); each is warmed up "
        "before the first round; no prompt is sent to a server twice, so no prefix cache helps anyone. Base traffic "
        "goes to a llama.cpp and a vLLM without adapters, which is their faster way. Client and server share the "
        f"cores.\n\n{commands}"
    )
