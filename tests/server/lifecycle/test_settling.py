"""When a change has come to rest, told a clock of our own."""

import math

from server.lifecycle.folder_scan import FoundAdapter
from server.lifecycle.settling import INCOMPLETE_SECONDS, Settling

_QUIET = 0.5
_EPOCH = 1e9


def _found(fingerprint: str, *, age: float = 0.0, has_weights: bool = True) -> FoundAdapter:
    return FoundAdapter(fingerprint, _EPOCH - age, has_weights)


def test_files_just_written_wait_until_they_stay_as_they_are() -> None:
    settling = Settling({}, quiet=_QUIET)
    settling.update({"a": _found("1")}, 0.0, _EPOCH)
    assert (settling.settled, settling.next_look, settling.unsettled) == ({}, 0.5, {"a"})
    settling.update({"a": _found("2")}, 0.4, _EPOCH)  # another piece came: the wait begins anew
    settling.update({"a": _found("2")}, 0.8, _EPOCH)
    assert (settling.settled, settling.next_look) == ({}, 0.9)
    settling.update({"a": _found("2")}, 0.9, _EPOCH)
    assert (settling.settled, settling.next_look, settling.unsettled) == ({"a": "2"}, math.inf, set())


def test_files_at_rest_for_long_count_at_once() -> None:
    settling = Settling({}, quiet=_QUIET)
    settling.update({"a": _found("1", age=1.0)}, 0.0, _EPOCH)
    assert settling.settled == {"a": "1"}


def test_files_from_a_clock_ahead_of_ours_count_when_they_stay_as_they_are() -> None:
    settling = Settling({}, quiet=_QUIET)
    settling.update({"a": _found("1", age=-3600)}, 0.0, _EPOCH)
    assert settling.settled == {}
    settling.update({"a": _found("1", age=-3600)}, 0.5, _EPOCH)
    assert settling.settled == {"a": "1"}


def test_a_change_keeps_what_was_until_it_is_at_rest() -> None:
    settling = Settling({"a": "1"}, quiet=_QUIET)
    settling.update({"a": _found("2")}, 0.0, _EPOCH)
    assert settling.settled == {"a": "1"}
    settling.update({"a": _found("1")}, 0.1, _EPOCH)  # and back
    assert settling.unsettled == set()


def test_a_blink_is_no_removal_and_an_absence_is() -> None:
    settling = Settling({"a": "1"}, quiet=_QUIET)
    settling.update({}, 0.0, _EPOCH)
    settling.update({"a": _found("1")}, 0.3, _EPOCH)
    settling.update({}, 0.6, _EPOCH)
    assert (settling.settled, settling.next_look) == ({"a": "1"}, 1.1)
    settling.update({}, 1.1, _EPOCH)
    assert (settling.settled, settling.unsettled) == ({}, set())


def test_what_cannot_be_looked_at_stays() -> None:
    settling = Settling({"a": "1"}, quiet=_QUIET)
    for now in (0.0, 10.0):
        settling.update({}, now, _EPOCH, hidden={"a"})
    assert settling.settled == {"a": "1"}


def test_a_config_without_weights_is_given_time() -> None:
    settling = Settling({}, quiet=_QUIET)
    settling.update({"a": _found("1", age=100, has_weights=False)}, 0.0, _EPOCH)
    assert (settling.settled, settling.next_look) == ({}, INCOMPLETE_SECONDS)
    settling.update({"a": _found("1", age=100, has_weights=False)}, INCOMPLETE_SECONDS, _EPOCH)
    assert settling.settled == {"a": "1"}


def test_what_came_and_went_before_it_was_at_rest_is_forgotten() -> None:
    settling = Settling({}, quiet=_QUIET)
    settling.update({"a": _found("1")}, 0.0, _EPOCH)
    settling.update({}, 0.1, _EPOCH)
    assert (settling.unsettled, settling.next_look) == (set(), math.inf)
