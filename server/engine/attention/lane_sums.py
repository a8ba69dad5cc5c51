"""The sums of the lanes of several registers, as the lanes of one, in LLVM's terms.

One register at a time would cost four shuffles and four additions each. In a tree, two registers become one at every
level, half the lanes of both added to the other half, which is one shuffle and half an addition more a register. Knows
nothing of what is summed.
"""

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

_INDICES = ir.VectorType(ir.IntType(32), 16)


class LaneSums:
    """Registers come one by one and meet in pairs, so that few are held."""

    # For a pair of registers (lanes 0-15 and 16-31), the lanes that are added to one another; all are single
    # instructions of the processor: halves, quarters, then pairs and single lanes within quarters.
    _LEVELS = (
        ([*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]),
        ([q * 4 + i for q in (0, 2, 4, 6) for i in range(4)], [q * 4 + i for q in (1, 3, 5, 7) for i in range(4)]),
        ([q * 4 + i for q in range(4) for i in (0, 1, 16, 17)], [q * 4 + i for q in range(4) for i in (2, 3, 18, 19)]),
        ([q * 4 + i for q in range(4) for i in (0, 2, 16, 18)], [q * 4 + i for q in range(4) for i in (1, 3, 17, 19)]),
    )

    def __init__(self, builder: Any) -> None:
        self._builder = builder
        self._held: list[tuple[int, Any, list[int]]] = []  # level, register, and whose sum each lane is part of

    def add(self, register: Any, owners: list[int], *, level: int) -> None:
        """A register whose lane i is part of the sum owners[i], after `level` levels."""
        while self._held and self._held[-1][0] == level:
            _, other, others = self._held.pop()
            near, far = self._LEVELS[level]
            both = others + owners
            owners = [both[lane] for lane in near]
            assert owners == [both[lane] for lane in far]
            register = self._builder.fadd(self.shuffled(other, register, near), self.shuffled(other, register, far))
            level += 1
        self._held.append((level, register, owners))

    def result(self) -> tuple[Any, list[int]]:
        """The one register left, and whose sum each lane is part of."""
        ((_, register, owners),) = self._held
        return register, owners

    def shuffled(self, a: Any, b: Any, lanes: list[int]) -> Any:
        return self._builder.shuffle_vector(a, b, ir.Constant(_INDICES, lanes))
