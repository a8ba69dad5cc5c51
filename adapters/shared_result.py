"""Several modules that read one input: the first one the model calls computes for all of them.

Stock model code calls q, k and v one after the other with the same tensor. Computing all outputs at the first call and
handing the rest over when asked makes one operation of three without touching the model's code. Knows no operation.
"""

from collections.abc import Callable, Sequence

from torch import Tensor


class SharedResult:
    """The outputs of `compute`, one per module, until each has been asked for."""

    __slots__ = ("_compute", "_input", "_outputs")

    def __init__(self, compute: Callable[[Tensor], Sequence[Tensor]]) -> None:
        self._compute = compute
        self._input: Tensor | None = None  # held, so that no other tensor takes its identity
        self._outputs: list[Tensor | None] = []

    def take(self, index: int, x: Tensor) -> Tensor:
        """The output of module `index` for x."""
        if self._input is not x or self._outputs[index] is None:
            self._outputs = [*self._compute(x)]
            self._input = x
        y = self._outputs[index]
        assert y is not None
        self._outputs[index] = None
        if index == len(self._outputs) - 1:
            self.forget()
        return y

    def forget(self) -> None:
        """Let go of outputs nobody asked for."""
        self._input, self._outputs = None, []
