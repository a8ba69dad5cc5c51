"""Names, versions and leases: nothing is freed while it is used, everything is freed once when it is not."""

from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from adapters.adapter_ref import AdapterRef, AdapterVersion, Lease
from adapters.errors import AdapterAlreadyLoaded, AdapterNameInvalid, AdapterNotFound
from adapters.registry import AdapterRegistry, AdapterState, check_adapter_name


def ref_of(name: str, version: str, source: str = "somewhere") -> AdapterRef:
    return AdapterRef(
        name=name, version=AdapterVersion(version), source=source, lora_rank=4, num_bytes=64, modules=("m",)
    )  # fmt: skip


class Scene:
    """A registry, its clock that ticks once per look, and what it reported as unused."""

    def __init__(self) -> None:
        self.unused: list[str] = []
        ticks = count(100)
        self.registry = AdapterRegistry(
            reserved_names=["base"], on_unused=self.unused.append, clock=lambda: float(next(ticks))
        )


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_lease_keeps_a_version_until_it_is_released(scene: Scene) -> None:
    scene.registry.register(ref_of("a", "v1"))
    lease = scene.registry.acquire("a")
    assert scene.registry.unregister("a").version == "v1"
    with pytest.raises(AdapterNotFound):
        scene.registry.acquire("a")
    assert [(info.ref.name, info.state, info.leases) for info in scene.registry.list()] == [
        ("a", AdapterState.DRAINING, 1)
    ]
    assert scene.unused == [] and scene.registry.is_held(AdapterVersion("v1"))
    lease.release()
    lease.release()
    assert scene.unused == ["v1"] and scene.registry.list() == ()


def test_the_same_bytes_again_are_a_success(scene: Scene) -> None:
    first = scene.registry.register(ref_of("a", "v1", "here"))
    assert scene.registry.register(ref_of("a", "v1", "there")) is first
    assert scene.registry.register(ref_of("a", "v1"), replace=True) is first
    assert scene.unused == [] and len(scene.registry) == 1


def test_other_bytes_need_replace_and_leave_requests_in_flight_alone(scene: Scene) -> None:
    scene.registry.register(ref_of("a", "v1"))
    old = scene.registry.acquire("a")
    with pytest.raises(AdapterAlreadyLoaded, match="load_inplace"):
        scene.registry.register(ref_of("a", "v2"))
    scene.registry.register(ref_of("a", "v2"), replace=True)
    new = scene.registry.acquire("a")
    assert (old.ref.version, new.ref.version) == ("v1", "v2")
    new.release()
    assert scene.unused == []
    old.release()
    assert scene.unused == ["v1"] and scene.registry.describe("a").ref.version == "v2"


def test_two_names_share_a_version(scene: Scene) -> None:
    scene.registry.register(ref_of("a", "v1"))
    scene.registry.register(ref_of("b", "v1"))
    scene.registry.unregister("a")
    assert scene.unused == [] and [info.ref.name for info in scene.registry.list()] == ["b"]
    scene.registry.unregister("b")
    assert scene.unused == ["v1"]


def test_a_draining_version_comes_back_when_it_is_named_again(scene: Scene) -> None:
    scene.registry.register(ref_of("a", "v1"))
    lease = scene.registry.acquire("a")
    scene.registry.unregister("a")
    scene.registry.register(ref_of("again", "v1"))
    lease.release()
    assert scene.unused == [] and scene.registry.describe("again").state is AdapterState.READY


def test_describe_tells_times_by_the_clock_given(scene: Scene) -> None:
    scene.registry.register(ref_of("a", "v1"))
    assert (scene.registry.describe("a").loaded_at, scene.registry.describe("a").last_used) == (100.0, None)
    scene.registry.acquire("a")
    info = scene.registry.describe("a")
    assert (info.loaded_at, info.last_used, info.leases) == (100.0, 101.0, 1)


def test_the_owner_may_register_from_within_the_callback() -> None:
    calls: list[str] = []

    def on_unused(version: AdapterVersion) -> None:
        registry.check_integrity()
        calls.append(version)
        if version == "v1":
            registry.register(ref_of("next", "v1"))

    registry = AdapterRegistry(reserved_names=(), on_unused=on_unused)
    registry.register(ref_of("a", "v1"))
    registry.unregister("a")
    assert calls == ["v1"] and "next" in registry
    registry.check_integrity()


@pytest.mark.parametrize("name", ["sql-lora", "org/repo", "base:sql", "org/repo@main", "a.b_c", "0", "A" * 128])
def test_names_in_use_are_taken(name: str) -> None:
    check_adapter_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "a b",
        "/a",
        "a/",
        "a//b",
        "../a",
        "a/../b",
        "a..b",
        "-a",
        ".a",
        "a\n",
        "a\0",
        "é",
        "A" * 129,
        "a+b",
        "a%2",
    ],
)
def test_other_names_are_not(name: str, scene: Scene) -> None:
    with pytest.raises(AdapterNameInvalid) as caught:
        scene.registry.register(ref_of(name, "v1"))
    assert str(caught.value).isprintable()


def test_the_base_models_name_is_reserved(scene: Scene) -> None:
    with pytest.raises(AdapterNameInvalid, match="base model"):
        scene.registry.register(ref_of("base", "v1"))


def test_an_unknown_name_tells_nothing_of_the_others(scene: Scene) -> None:
    scene.registry.register(ref_of("secret", "v1"))
    for ask in (scene.registry.acquire, scene.registry.unregister, scene.registry.describe):
        with pytest.raises(AdapterNotFound) as caught:
            ask("other")
        assert "secret" not in str(caught.value)


NAMES = st.sampled_from(["a", "b", "c"])
VERSIONS = st.sampled_from(["v1", "v2", "v3"])


class RegistryMachine(RuleBasedStateMachine):
    """Any order of register, replace, unregister, acquire and release, beside a model of two dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.scene = Scene()
        self.names: dict[str, str] = {}
        self.leases: list[Lease] = []
        self.num_lives = 0

    def held(self) -> set[str]:
        return set(self.names.values()) | {str(lease.ref.version) for lease in self.leases}

    def give(self, name: str, version: str) -> None:
        self.num_lives += version not in self.held()
        self.names[name] = version

    @rule(name=NAMES, version=VERSIONS, replace=st.booleans())
    def register(self, name: str, version: str, replace: bool) -> None:
        is_taken = self.names.get(name) not in (None, version)
        try:
            self.scene.registry.register(ref_of(name, version), replace=replace)
            assert replace or not is_taken
            self.give(name, version)
        except AdapterAlreadyLoaded:
            assert is_taken and not replace

    @rule(name=NAMES)
    def unregister(self, name: str) -> None:
        try:
            assert self.scene.registry.unregister(name).version == self.names.pop(name)
        except AdapterNotFound:
            assert name not in self.names

    @rule(name=NAMES)
    def acquire(self, name: str) -> None:
        try:
            self.leases.append(self.scene.registry.acquire(name))
            assert self.leases[-1].ref.version == self.names[name]
        except AdapterNotFound:
            assert name not in self.names

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.leases:
            self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1))).release()

    @invariant()
    def agrees(self) -> None:
        registry = self.scene.registry
        registry.check_integrity()
        assert {info.ref.name: info.ref.version for info in registry.list() if info.state == "ready"} == self.names
        assert {str(info.ref.version) for info in registry.list()} == self.held()
        assert len(self.scene.unused) == self.num_lives - len(self.held())  # one report for each life that ended


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
