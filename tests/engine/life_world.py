"""Names, leases and a real engine on a tiny model, driven by hand: every reply is held against its version alone.

`Shelf` is what can be asked: adapters of several ranks, prompts that share beginnings, and for each of them the greedy
tokens of an engine that had nothing else to do. `LifeWorld` is what a server holds, without the server: registry,
engine, host room, and who asked for what. Whatever it is told to do, a request that ends with other tokens than its
version's own is a violation. Knows no HTTP and no event loop.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from adapters.adapter_ref import AdapterRef, AdapterUse, AdapterVersion, Lease
from adapters.checkpoint import load_lora_model
from adapters.errors import AdapterCapacity, AdapterNotFound
from adapters.lora_layers import LoRALayers
from adapters.lora_model import LoRAModel
from adapters.registry import AdapterRegistry
from server.engine.engine import Engine
from server.engine.request import FinishReason, Request, RequestOutput, SamplingParams
from tests.adapters.hostile import draft
from tests.equivalence.architectures import VOCAB, save
from tests.equivalence.harness import LIMITS, EngineHarness, Squeeze, open_engine

BASE: AdapterVersion | None = None
RANKS = (4, 8, 4, 16, 8, 4)
MAX_TOKENS = 24
_MIN_MARGIN = 2e-3  # between the best and the second logit: what cutting a prompt otherwise may move in float32


@dataclass(frozen=True)
class Shelf:
    """What can be asked. `oracle[version, prompt]` are MAX_TOKENS greedy tokens of an engine that did nothing else."""

    model: Path
    folders: tuple[Path, ...]
    models: tuple[LoRAModel, ...]
    prompts: tuple[tuple[int, ...], ...]
    oracle: dict[tuple[AdapterVersion | None, int], list[int]]
    row_bytes: int  # of the device pools

    @classmethod
    def build(cls, folder: Path, *, num_prompts: int = 4) -> "Shelf":
        model = save("llama", folder / "model")
        harness = EngineHarness.open(model, "float32")
        base = harness.engine.base
        folders = tuple(write_adapter(folder / f"bytes{i}", harness.engine, i, r=r) for i, r in enumerate(RANKS))
        models = tuple(load_lora_model(f, base.modules, limits=LIMITS, dtype=base.dtype).model for f in folders)
        for each in models:
            harness.engine.load_adapter(each)
        prompts, oracle = _find_prompts(harness, [BASE, *(each.version for each in models)], num_prompts)
        return cls(model, folders, models, prompts, oracle, LoRALayers.bytes_per_row(base.modules, base.dtype))

    def model_of(self, version: AdapterVersion) -> LoRAModel:
        return next(model for model in self.models if model.version == version)

    def whose(self, tokens: Sequence[int], prompt: int) -> str:
        """Whose tokens these are, for a message."""
        found = [
            str(version)[:8]
            for (version, asked), own in self.oracle.items()
            if asked == prompt and own[: len(tokens)] == list(tokens)
        ]
        return f"tokens of {found[0]}" if found else "tokens of nobody"


def write_adapter(folder: Path, engine: Engine, seed: int, *, r: int) -> Path:
    """Random A and B on every linear of the base, wide enough that it answers unlike any other."""
    written = draft(folder, engine.base.modules, r=r, seed=seed, num_modules=len(engine.base.modules.linears))
    written.config["lora_alpha"] = 2 * r
    for name in written.tensors:
        written.tensors[name] *= 0.05
    written.write()
    return folder


def _find_prompts(
    harness: EngineHarness, versions: Sequence[AdapterVersion | None], count: int
) -> tuple[tuple[tuple[int, ...], ...], dict[tuple[AdapterVersion | None, int], list[int]]]:
    """Prompts that tell all versions apart and on which no version is ever near a tie."""
    random, prompts = Random(0), []
    shared = random.sample(range(3, VOCAB), 9)
    oracle: dict[tuple[AdapterVersion | None, int], list[int]] = {}
    while len(prompts) < count:
        prompt = (*shared[: random.choice((3, 8, 9))], *random.sample(range(3, VOCAB), random.randint(1, 5)))
        answers = {version: _alone(harness, version, prompt, f"{prompt}/{version}") for version in versions}
        if None not in answers.values() and len({tuple(each or ())[:4] for each in answers.values()}) == len(versions):
            oracle.update(((version, len(prompts)), tokens or []) for version, tokens in answers.items())
            prompts.append(prompt)
    return tuple(prompts), oracle


def _alone(
    harness: EngineHarness, version: AdapterVersion | None, prompt: Sequence[int], request_id: str
) -> list[int] | None:
    """The greedy tokens of one request with the engine to itself; None when one of them was nearly another."""
    harness.add(request_id, prompt, *([] if version is None else [version]), max_tokens=MAX_TOKENS)
    harness.run()
    best = harness.chosen_logits(request_id).topk(2).values  # [MAX_TOKENS, 2]
    return harness.tokens(request_id) if float((best[:, 0] - best[:, 1]).min()) > _MIN_MARGIN else None


@dataclass
class Asked:
    """One request on its way, with what it must answer."""

    request: Request
    lease: Lease | None
    version: AdapterVersion | None
    prompt: int
    tokens: list[int] = field(default_factory=list)


class LifeWorld:
    """`host_room` is how many versions host memory holds, `device_rows` how many rows the pools have."""

    def __init__(
        self,
        shelf: Shelf,
        *,
        host_room: int | None = None,
        device_rows: int = 64,
        num_blocks: int | None = None,
        max_loras: int | None = None,
        max_bypassed_steps: int = 256,
        max_num_seqs: int = 8,
    ) -> None:
        self.shelf = shelf
        self._squeeze = Squeeze(
            num_blocks=num_blocks,
            lora_memory=device_rows * shelf.row_bytes,
            max_cpu_loras=host_room,
            max_loras=max_loras,
            max_bypassed_steps=max_bypassed_steps,
            max_num_seqs=max_num_seqs,
        )
        self.seen: Counter[str] = Counter()
        self.step_versions: list[frozenset[str]] = []  # of every step: whose rows ran, "" = base
        self._number = 0
        self._start()

    def _start(self) -> None:
        self.engine = open_engine(self.shelf.model, "float32", self._squeeze)
        self.registry = AdapterRegistry(reserved_names=("base",), on_unused=self._free)
        self.live: dict[str, Asked] = {}
        self.ended: dict[str, Asked] = {}
        self._used: dict[AdapterVersion, None] = {}  # in host memory, the longest unused first

    # What an operator does.

    def load(self, name: str, which: int) -> AdapterVersion | None:
        """Load or replace; None when host memory is full of versions in use."""
        model = self.shelf.models[which]
        if not self._make_resident(model.version):
            return None
        held = self.registry.describe(name).ref.version if name in self.registry else None
        self.seen["replaced in flight"] += held != model.version and held in self._versions_in_flight()
        self.registry.register(self._ref(name, model), replace=True)
        return model.version

    def unload(self, name: str) -> None:
        self.seen["unloaded in flight"] += self.registry.describe(name).ref.version in self._versions_in_flight()
        self.registry.unregister(name)

    def evict(self, version: AdapterVersion) -> None:
        """Out of host memory and the pools, as a host tier does with what nobody uses; the name stays."""
        assert version not in self._leased(), "a leased version is no victim"
        self.engine.unload_adapter(version)
        self._used.pop(version, None)
        self.seen["evicted from host"] += 1

    def restart(self) -> None:
        """The process dies and comes back: names are known, nothing is in memory, every request is gone."""
        names = {info.ref.name: info.ref for info in self.registry.list() if info.ref.name in self.registry}
        self._start()
        for name, ref in names.items():
            if self._make_resident(ref.version):
                self.registry.register(self._ref(name, self.shelf.model_of(ref.version)))
        self.seen["restarted"] += 1

    # What a client does.

    def ask(self, name: str | None, prompt: int, *, max_tokens: int = MAX_TOKENS) -> str | None:
        """Send a request to an adapter, None = the base; its id, or None when there is no such name or no room."""
        lease = None
        if name is not None:
            try:
                lease = self.registry.acquire(name)
            except AdapterNotFound:
                self.seen["not found"] += 1
                return None
            if not self._make_resident(lease.ref.version):
                lease.release()
                self.seen["no room"] += 1
                return None
        return self.ask_with(lease, prompt, max_tokens=max_tokens)

    def ask_with(self, lease: Lease | None, prompt: int, *, max_tokens: int = MAX_TOKENS) -> str:
        """Send a request under a lease that was taken before, None = the base."""
        version = None if lease is None else lease.ref.version
        self._number += 1
        request = Request(
            request_id=f"r{self._number}",
            prompt_token_ids=self.shelf.prompts[prompt],
            sampling_params=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
            adapters=() if version is None else (AdapterUse(version),),
            arrival_time=float(self._number),
        )
        self.live[request.request_id] = Asked(request, lease, version, prompt)
        self.engine.add_request(request)
        return request.request_id

    def cancel(self, request_id: str) -> None:
        output = self.engine.abort(request_id)
        assert output is not None, f"{request_id} is live here and unknown to the engine"
        self.seen["cancelled"] += 1
        self._take(output)

    # What the engine does.

    def step(self) -> None:
        preempted, resident = self.engine.stats().num_preemptions, set(self.engine.adapters.active_versions)
        result = self.engine.step()
        self.step_versions.append(frozenset(self._running_versions()))
        self.seen["preempted"] += result.stats.num_preemptions - preempted
        self.seen["evicted from device"] += len(resident - set(result.stats.active_versions))
        self.seen["prefix hits"] = result.stats.prefix_hits
        for output in result.outputs:
            self._take(output)

    def run(self, max_steps: int = 5000) -> None:
        """Until every request has ended; then nothing may be left of any."""
        for _ in range(max_steps):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.live, f"{len(self.live)} requests never ended"
        blocks = self.engine.blocks
        assert blocks.num_free == blocks.num_blocks and not blocks.holders, "ended requests hold blocks"
        assert not self._leased(), "ended requests hold leases"
        self.check()

    def tokens(self, request_id: str) -> list[int]:
        return self.ended[request_id].tokens

    def check(self) -> None:
        """Engine, registry and this world tell the same story."""
        self.engine.check_integrity()
        self.registry.check_integrity()
        host = set(self.engine.adapters.host)
        leased = self._leased()
        assert leased <= host, "a leased version left host memory"
        assert host == set(self._used), "host memory holds what nobody put there, or lost what it should have"
        assert all(self.registry.is_held(version) for version in host), "an unheld version was not freed"
        for info in self.registry.list():
            own = [each for each in self.live.values() if each.version == info.ref.version]
            assert info.leases == len(own), f"{info.leases} leases for {len(own)} requests"

    # Behind the scenes.

    def _take(self, output: RequestOutput) -> None:
        asked = self.live[output.request_id]
        asked.tokens.extend(output.new_token_ids)
        own = self.shelf.oracle[asked.version, asked.prompt]
        assert asked.tokens == own[: len(asked.tokens)], (
            f"{output.request_id} of version {str(asked.version)[:8]} got {asked.tokens}, "
            f"{self.shelf.whose(asked.tokens, asked.prompt)}; alone it answers {own[: len(asked.tokens)]}"
        )
        self.seen["tokens"] += len(output.new_token_ids)
        if output.finish_reason is not None:
            self._end(asked, output)

    def _end(self, asked: Asked, output: RequestOutput) -> None:
        assert output.finish_reason in (FinishReason.LENGTH, FinishReason.ABORT), f"lost: {output.error}"
        if output.finish_reason is FinishReason.LENGTH:
            assert len(asked.tokens) == asked.request.sampling_params.max_tokens
            self.seen["ended"] += 1
        self.ended[output.request_id] = self.live.pop(output.request_id)
        if asked.lease is not None:
            asked.lease.release()

    def _make_resident(self, version: AdapterVersion) -> bool:
        """Load into host memory, at the cost of the longest unused versions without a lease."""
        self._used[version] = self._used.pop(version, None)
        while version not in self.engine.adapters.host:
            try:
                self.engine.load_adapter(self.shelf.model_of(version))
            except AdapterCapacity:
                victim = next((v for v in self._used if v != version and v not in self._leased()), None)
                if victim is None:
                    del self._used[version]
                    return False
                self.evict(victim)
        return True

    def _free(self, version: AdapterVersion) -> None:
        self.engine.unload_adapter(version)
        self._used.pop(version, None)

    def _leased(self) -> set[AdapterVersion]:
        return {info.ref.version for info in self.registry.list() if info.leases}

    def _versions_in_flight(self) -> set[AdapterVersion | None]:
        return {asked.version for asked in self.live.values()}

    def _running_versions(self) -> set[str]:
        running = [each for each in self.live.values() if each.request.block_table]
        return {str(each.version or "") for each in running}

    @staticmethod
    def _ref(name: str, model: LoRAModel) -> AdapterRef:
        return AdapterRef(
            name=name,
            version=model.version,
            source="shelf",
            lora_rank=model.lora_rank,
            num_bytes=model.num_bytes,
            modules=tuple(model.modules),
        )
