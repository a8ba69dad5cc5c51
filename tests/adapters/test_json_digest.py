"""The digest of a large object: the same for the same values in any order, another for any other value."""

import json
from typing import Any

import pytest

from adapters import json_digest
from adapters.json_digest import digest_of_fields

VOCAB = {f"token{i}": i for i in range(20_000)}
FIELDS: dict[str, Any] = {"model": {"vocab": VOCAB, "merges": [["a", f"b{i}"] for i in range(9000)]}, "version": "1.0"}


def test_the_order_of_keys_says_nothing() -> None:
    model = FIELDS["model"]
    turned = {"merges": model["merges"], "vocab": dict(reversed(VOCAB.items()))}
    assert digest_of_fields({"version": "1.0", "model": turned}) == digest_of_fields(FIELDS)


@pytest.mark.parametrize(
    "change",
    [
        {"vocab": VOCAB | {"token7": 8}},
        {"vocab": VOCAB | {"\ud800": 20_000}},
        {"vocab": {}},
        {"vocab": list(VOCAB.items())},
        {"merges": FIELDS["model"]["merges"][::-1]},
        {"merges": FIELDS["model"]["merges"][:-1]},
        {"merges": None},
    ],
)
def test_every_other_value_does(change: dict[str, Any]) -> None:
    assert digest_of_fields({**FIELDS, "model": FIELDS["model"] | change}) != digest_of_fields(FIELDS)


def test_the_encoder_is_never_given_more_than_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the interpreter until it is done."""
    given = []

    def spelled(value: Any) -> bytes:
        given.append(len(value) if isinstance(value, dict | list) else 1)
        return json.dumps(value).encode()

    monkeypatch.setattr(json_digest, "_spelled", spelled)
    digest_of_fields(FIELDS)
    assert sum(given) >= 29_000 and max(given) <= 4500
