"""Names, versions and leases: nothing is freed while it is used, everything is freed once when it is not."""

from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from adapters.adapter_ref import AdapterRef, AdapterVersion, Lease
from adapters.errors import AdapterAlreadyLoaded, AdapterNameInvalid, AdapterNotFound
from adapters.registry import AdapterRegistry, check_adapter_name


def ref_of(name: str, version: str, source: str = "somewhere") -> AdapterRef:
    return AdapterRef(
        name=name, version=AdapterVersion(version), source=source, lora_rank=4, num_bytes=64, modules=("m",)
    )  # fmt: skip


class Scene:
    """A registry, its clock that ticks once per look, and what it reported as unused and as released."""

    def __init__(self) -> None:
        self.unused: list[str] = []
        self.released: list[str] = []
        ticks = count(100)
        self.registry = AdapterRegistry(
            reserved_names=["base"],
            on_unused=self.unused.append,
            on_released=self.released.append,
            clock=lambda: float(next(ticks)),
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
    assert [(info.ref.name, info.is_registered, info.leases) for info in scene.registry.list()] == [("a", False, 1)]
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
    assert scene.unused == [] and scene.registry.describe("again").is_registered


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


def test_every_release_is_told_before_the_version_is_forgotten(scene: Scene) -> None:
    scene.registry.register(ref_of("a", "v1"))
    first, second = scene.registry.acquire("a"), scene.registry.acquire("a")
    assert scene.registry.num_leases(AdapterVersion("v1")) == 2
    assert set(scene.registry.leases(AdapterVersion("v1"))) == {first, second}
    first.release()
    first.release()
    assert (scene.released, scene.unused) == (["v1"], [])
    scene.registry.unregister("a")
    seen: list[bool] = []
    registry = AdapterRegistry(
        reserved_names=(),
        on_unused=lambda version: seen.append(registry.is_held(version)),
        on_released=lambda version: seen.append(registry.is_held(version) and not registry.num_leases(version)),
    )
    registry.register(ref_of("b", "v2"))
    lease = registry.acquire("b")
    registry.unregister("b")
    lease.release()
    assert seen == [True, False]
    second.release()
    assert (scene.released, scene.unused) == (["v1", "v1"], ["v1"])
    assert scene.registry.num_leases(AdapterVersion("v1")) == 0 and not scene.registry.leases(AdapterVersion("v1"))


V1, V2, V3 = (AdapterVersion(f"{digit}" * 64) for digit in "123")


def keep(scene: Scene, name: str, version: str, *previous: str) -> None:
    scene.registry.register(
        ref_of(name, version), replace=True, previous=tuple(ref_of(name, before) for before in previous)
    )


def test_kept_versions_can_be_asked_for_and_are_not_current(scene: Scene) -> None:
    keep(scene, "a", V1)
    keep(scene, "a", V2, V1)
    assert scene.unused == [] and scene.registry.is_held(V1)
    assert [scene.registry.is_current(version) for version in (V1, V2, V3)] == [False, True, False]
    assert scene.registry.names_of(V1) == scene.registry.names_of(V2) == ("a",)
    old, new = scene.registry.acquire_version("a", V1), scene.registry.acquire("a")
    assert (old.ref.version, new.ref.version, old.ref.name) == (V1, V2, "a")
    assert [(info.ref.version, info.leases) for info in scene.registry.list()] == [(V2, 1)]
    keep(scene, "a", V3, V2)  # V1 is kept no longer, and drains
    draining = [info for info in scene.registry.list() if not info.is_registered]
    assert [(info.ref.version, info.leases) for info in draining] == [(V1, 1)]
    with pytest.raises(AdapterNotFound):
        scene.registry.acquire_version("a", V1)
    old.release()
    assert scene.unused == [V1]
    scene.registry.unregister("a")
    assert scene.unused == [V1, V3]
    new.release()
    assert scene.unused == [V1, V3, V2]


def test_back_to_a_kept_version(scene: Scene) -> None:
    keep(scene, "a", V2, V1)
    keep(scene, "a", V1, V2)
    assert scene.unused == [] and scene.registry.describe("a").ref.version == V1
    assert scene.registry.is_current(V1) and not scene.registry.is_current(V2)


def test_a_version_that_one_name_keeps_and_another_stands_for_is_current(scene: Scene) -> None:
    keep(scene, "a", V2, V1)
    keep(scene, "b", V1)
    assert scene.registry.is_current(V1) and scene.registry.names_of(V1) == ("a", "b")
    scene.registry.unregister("b")
    assert not scene.registry.is_current(V1) and scene.unused == []
    scene.registry.unregister("a")
    assert sorted(scene.unused) == [V1, V2]


def test_a_version_is_found_by_digits_that_only_it_begins_with(scene: Scene) -> None:
    near = AdapterVersion(V1[:10] + "a" * 54)
    keep(scene, "a", V2, V1, near)
    find = scene.registry.find_version
    assert find("a", V2) == find("a", V2[:8]) == V2
    assert find("a", V1[:11]) == V1 and find("a", near[:11]) == near
    assert find("a", V1[:10]) is None, "two versions begin so"
    assert find("a", V2[:7]) is None, "too few digits"
    assert find("a", V3) is None and find("b", V2) is None and find("a", "") is None


def test_a_revoked_lease_tells_its_holder_once_and_stays_until_it_is_released(scene: Scene) -> None:
    scene.registry.register(ref_of("a", "v1"))
    lease, calls = scene.registry.acquire("a"), list[str]()
    lease.on_revoked = lambda: calls.append("revoked")
    scene.registry.unregister("a")
    lease.revoke()
    assert lease.is_revoked and lease.is_open and calls == ["revoked"] and scene.unused == []
    lease.release()
    lease.revoke()
    assert calls == ["revoked"] and scene.unused == ["v1"]


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
        self.names: dict[str, tuple[str, ...]] = {}  # the version it stands for, then those it keeps
        self.leases: list[Lease] = []
        self.num_lives = 0
        self.num_released = 0

    def held(self) -> set[str]:
        named = {version for versions in self.names.values() for version in versions}
        return named | {str(lease.ref.version) for lease in self.leases}

    def give(self, name: str, version: str, previous: list[str]) -> None:
        self.num_lives += len({version, *previous} - self.held())
        self.names[name] = (version, *previous)

    @rule(name=NAMES, version=VERSIONS, replace=st.booleans(), previous=st.lists(VERSIONS, max_size=2, unique=True))
    def register(self, name: str, version: str, replace: bool, previous: list[str]) -> None:
        previous = [before for before in previous if before != version]
        is_taken = name in self.names and self.names[name][0] != version
        kept = tuple(ref_of(name, before) for before in previous)
        try:
            self.scene.registry.register(ref_of(name, version), replace=replace, previous=kept)
            assert replace or not is_taken
            self.give(name, version, previous)
        except AdapterAlreadyLoaded:
            assert is_taken and not replace

    @rule(name=NAMES)
    def unregister(self, name: str) -> None:
        try:
            assert self.scene.registry.unregister(name).version == self.names.pop(name)[0]
        except AdapterNotFound:
            assert name not in self.names

    @rule(name=NAMES)
    def acquire(self, name: str) -> None:
        try:
            self.leases.append(self.scene.registry.acquire(name))
            assert self.leases[-1].ref.version == self.names[name][0]
        except AdapterNotFound:
            assert name not in self.names

    @rule(name=NAMES, version=VERSIONS)
    def acquire_version(self, name: str, version: str) -> None:
        try:
            self.leases.append(self.scene.registry.acquire_version(name, AdapterVersion(version)))
            assert version in self.names[name] and self.leases[-1].ref.version == version
        except AdapterNotFound:
            assert version not in self.names.get(name, ())

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.leases:
            self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1))).release()
            self.num_released += 1

    @invariant()
    def agrees(self) -> None:
        registry = self.scene.registry
        registry.check_integrity()
        registered = {info.ref.name: info.ref.version for info in registry.list() if info.is_registered}
        assert registered == {name: versions[0] for name, versions in self.names.items()}
        kept = {version for versions in self.names.values() for version in versions[1:]}
        draining = {str(info.ref.version) for info in registry.list() if not info.is_registered}
        assert draining == self.held() - kept - set(registered.values())
        assert {version for version in ("v1", "v2", "v3") if registry.is_held(AdapterVersion(version))} == self.held()
        assert len(self.scene.released) == self.num_released
        assert len(self.scene.unused) == self.num_lives - len(self.held())  # one report for each life that ended


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
