"""One forward pass on the CPU, recorded while stock model code runs it, to be run again without that code.

A decode step of a small model spends as long in Python, module by module, as in its kernels, and keeps the
interpreter's lock from connections meanwhile. What the pass really does is a list of kernel calls (ThreadTeam) between
a few of torch's operations, on tensors whose shapes only the number of rows decides. Recorded once, the list runs on
other numbers in the same tensors. Knows no model, and of kernels only their addresses.

A pass that asks a tensor for its value, or whose shapes depend on values, cannot be recorded: `NotRecordable`. What no
operation shows, such as Python's own counters, is played back as it was.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from adapters.host_call import HostFunction, watched_host_calls
from adapters.ops.chunk_kernel import Kernel
from adapters.ops.thread_team import KernelArguments, KernelProgram, ThreadTeam, watched_kernels
from server.engine import fused_kernels as kernels
from server.engine.tensor_arena import TensorArena

_ASKS_FOR_VALUES = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}
_ASKS_UNSAID = {  # without a tag
    torch.ops.aten.where.default,
    torch.ops.aten.nonzero_numpy.default,
    torch.ops.aten.repeat_interleave.self_Tensor,
    torch.ops.aten.narrow.Tensor,
    torch.ops.aten.tensor_split.tensor_indices_or_sections,
}
_OF_TENSORS = (torch.TensorType, torch.ListType)  # kinds of results; the rest are Python's numbers
_MASKS = {torch.bool, torch.uint8}
_ONLY_ALLOCATES = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}

Part = KernelProgram | Callable[[], object]


class NotRecordable(Exception):
    """The pass did what cannot be played back; the message says what."""


class Recording:
    """A recorded pass. Its result is the arena's memory: it stands until the next pass, recorded or played back."""

    def __init__(self, team: ThreadTeam, parts: list[Part], output: Tensor, held: object) -> None:
        self._team, self._parts, self._output = team, parts, output
        self._held = held  # whose addresses the parts know

    @property
    def num_kernels(self) -> int:
        return sum(len(part) for part in self._parts if isinstance(part, KernelProgram))

    @property
    def num_operations(self) -> int:
        """Of torch, which run one by one, and calls of plain Python (adapters/host_call.py)."""
        return sum(not isinstance(part, KernelProgram) for part in self._parts)

    def play(self) -> Tensor:
        """Run again on what the tensors that were given to the pass hold now."""
        for part in self._parts:
            if isinstance(part, KernelProgram):
                self._team.run_program(part)
            else:
                part()
        return self._output


def record(run: Callable[[], Tensor], team: ThreadTeam, arena: TensorArena) -> tuple[Tensor, Recording]:
    """Run `run` once, and record it. The result is that of a pass that was not recorded.

    Every tensor made inside lies in `arena`, at the place where it will be made again. What another recording left
    there is overwritten.
    """
    arena.clear()
    recorder = _Recorder(team, arena)
    with recorder, watched_kernels(recorder.note_kernel), watched_host_calls(recorder.run_host_call):
        output = run()
    return output, Recording(team, recorder.parts, arena.view(output), (arena, recorder.held))


class _Recorder(TorchDispatchMode):
    """Sees every operation of torch, after autograd and before it is computed."""

    def __init__(self, team: ThreadTeam, arena: TensorArena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._team, self._arena = team, arena
        self.parts: list[Part] = []
        self.held: list[Tensor] = []  # what our own sums read, wherever it lies
        self._is_hosting = False

    def run_host_call(self, function: HostFunction, tensors: tuple[Tensor, ...]) -> None:
        """Run a call of plain Python unseen, and note it whole: it may ask for values, and does so each time anew."""
        self._is_hosting = True
        try:
            with _disable_current_modes():
                function(*tensors)
        finally:
            self._is_hosting = False
        views = [self._arena.view(tensor) for tensor in tensors]
        self.parts.append(lambda: function(*views))

    def note_kernel(self, kernel: Kernel, arguments: KernelArguments, num_chunks: int) -> None:
        if self._is_hosting:
            return
        last = self.parts[-1] if self.parts else None
        if not isinstance(last, KernelProgram):
            last = KernelProgram()
            self.parts.append(last)
        last.add(kernel, arguments, num_chunks)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.dropout.default and not args[2]:  # of a model that is not trained
            return args[0]
        if _asks_for_values(func, args):
            raise NotRecordable(f"{func} asks a tensor for its value")
        if func is torch.ops.aten.add.Tensor and not kwargs and _is_elementwise(*args):
            return self._add(*args)
        result = func(*args, **kwargs)
        if func in _ONLY_ALLOCATES:
            return self._arena.like(result)
        if _is_view(result, (args, kwargs)) and not func._schema.is_mutable:
            return result
        return self._operation(func, args, kwargs, result)

    def _add(self, left: Tensor, right: Tensor) -> Tensor:
        """left + right by our own kernel, the one operation of torch that stands between those of every layer."""
        out = self._arena.like(left)
        self.held += [self._arena.view(left), self._arena.view(right)]
        fields = np.array([out.data_ptr(), left.data_ptr(), right.data_ptr(), left.numel()], np.int64)
        self._team.run(kernels.ADD[left.dtype].address, KernelArguments(fields), -(-left.numel() // kernels.CHUNK))
        return out

    def _operation(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Note an operation that computes, its new tensors moved to the arena."""
        given = set(_storages((args, kwargs)))
        moved = tree_map_only(Tensor, lambda t: t if _storage(t) in given else self._arena.like(t).copy_(t), result)
        args, kwargs = tree_map_only(Tensor, self._arena.view, (args, kwargs))
        targets = [self._arena.view(t) for t in tree_leaves(moved) if isinstance(t, Tensor)]
        is_new = [_storage(t) not in given for t in tree_leaves(moved) if isinstance(t, Tensor)]

        def again() -> None:
            found = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for target, value, copies in zip(targets, found, is_new, strict=True):
                if copies:
                    target.copy_(value)

        self.parts.append(again)
        return moved


def _asks_for_values(func: Any, args: Any) -> bool:
    """Whether what an operation does depends on numbers in tensors, beyond the numbers that come out."""
    if func is torch.ops.aten.index.Tensor:  # of masks alone
        return any(isinstance(leaf, Tensor) and leaf.dtype in _MASKS for leaf in tree_leaves(args[1]))
    if func in _ASKS_UNSAID:
        return True
    gives_numbers = any(not isinstance(each.type, _OF_TENSORS) for each in func._schema.returns)
    return gives_numbers or bool(_ASKS_FOR_VALUES & set(func.tags))


def _is_elementwise(left: Any, right: Any, *rest: Any) -> bool:
    """Whether our kernel adds these: two dense tensors of one shape and dtype."""
    if rest or not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return False
    is_alike = left.shape == right.shape and left.dtype is right.dtype and left.dtype in kernels.ADD
    return is_alike and left.is_contiguous() and right.is_contiguous() and left.numel() > 0


def _is_view(result: Any, given: Any) -> bool:
    """Whether all that came out lies in what went in."""
    found = set(_storages(result))
    return bool(found) and found <= set(_storages(given))


def _storages(tree: Any) -> Iterator[int]:
    return (_storage(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _storage(tensor: Tensor) -> int:
    """What tells memory apart; weights that oneDNN packed show theirs to nobody."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)
