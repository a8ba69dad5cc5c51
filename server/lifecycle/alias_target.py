"""How an alias's target is written: an adapter's name, or one version of it. Knows nothing of who asks."""

import re

from adapters.adapter_ref import AdapterVersion
from server.lifecycle.catalogue_records import AliasTarget

_PINNED = re.compile(r"(?P<adapter>.+)@(?P<version>[0-9a-f]{8,64})")


def target_text(target: AliasTarget) -> str:
    """What `parse_target` reads, without the weight."""
    return target.adapter if target.version is None else f"{target.adapter}@{target.version[:12]}"


def parse_target(text: str, weight: float = 1.0) -> AliasTarget:
    """`sql`, or `sql@` with 8 to 64 hex digits of a version; any other @ belongs to the name (org/repo@main)."""
    pinned = _PINNED.fullmatch(text)
    if pinned is None:
        return AliasTarget(adapter=text, weight=weight)
    return AliasTarget(adapter=pinned["adapter"], version=AdapterVersion(pinned["version"]), weight=weight)
