"""Finds out which linears of a model read one input, by watching one forward pass. Knows nothing of architectures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class SharedInputs:
    """Groups of linears that the model called one after the other with the very same tensor."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, Tensor]] = []

    @contextmanager
    def watching(self, linears: dict[str, nn.Module]) -> Iterator[None]:
        """Note every call of `linears` inside."""
        handles = [linear.register_forward_pre_hook(self._noting(name)) for name, linear in linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Two names or more each, in the order of the calls. A linear called more than once is in none."""
        names = [name for name, _ in self._calls]
        found: list[list[str]] = []
        before: Tensor | None = None
        for name, x in self._calls:
            if names.count(name) > 1:
                before = None
            elif x is before:
                found[-1].append(name)
            else:
                found.append([name])
                before = x
        return tuple(tuple(group) for group in found if len(group) > 1)

    def _noting(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_module: nn.Module, args: tuple[Any, ...]) -> None:
            self._calls.append((name, args[0]))  # held, so that no other tensor takes its identity

        return note
