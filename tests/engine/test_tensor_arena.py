"""Tensors of a pass lie where those of the pass before lay, and no two that live at once share memory."""

import torch

from server.engine.tensor_arena import TensorArena


def _pass(arena: TensorArena) -> list[int]:
    """The places of three tensors of which the second is let go before the third is made."""
    arena.clear()
    first = arena.like(torch.empty(4, 33))
    second = arena.like(torch.empty(4, 33))
    places = [first.data_ptr(), second.data_ptr()]
    del second
    third = arena.like(torch.empty(4, 33))
    return [*places, third.data_ptr()]


def test_the_same_pass_takes_the_same_places() -> None:
    arena = TensorArena()
    first, second, third = _pass(arena)
    assert first != second and third == second, "a place is given again once nobody holds the tensor"
    assert _pass(arena) == [first, second, third]


def test_a_view_keeps_the_place() -> None:
    arena = TensorArena()
    tensor = arena.like(torch.empty(8, 8))
    place, view = tensor.data_ptr(), tensor[2:].T
    del tensor
    assert arena.like(torch.empty(8, 8)).data_ptr() != place
    del view
    assert arena.like(torch.empty(8, 8)).data_ptr() == place


def test_what_a_pass_before_still_holds_frees_nothing_in_the_next() -> None:
    arena = TensorArena()
    old = arena.like(torch.empty(8))
    arena.clear()
    new = arena.like(torch.empty(8))
    assert new.data_ptr() == old.data_ptr()
    del old
    assert arena.like(torch.empty(8)).data_ptr() != new.data_ptr()


def test_shapes_strides_and_dtypes_are_kept() -> None:
    arena = TensorArena()
    for like in (
        torch.empty(2, 3, dtype=torch.bfloat16),
        torch.empty_strided((1, 3, 5, 4), (60, 4, 12, 1)),
        torch.empty(0, 7, dtype=torch.int64),
        torch.empty((), dtype=torch.bool),
        torch.empty(3, 5)[:, ::2],
    ):
        found = arena.like(like)
        assert (found.shape, found.stride(), found.dtype) == (like.shape, like.stride(), like.dtype)
        assert found.data_ptr() % 128 == 0 or not found.numel()


def test_a_tensor_larger_than_a_block_has_one_of_its_own() -> None:
    arena = TensorArena()
    small, large = arena.like(torch.empty(10)), arena.like(torch.empty(40 << 20, dtype=torch.uint8))
    large.fill_(7)
    small.fill_(1.0)
    assert arena.num_bytes >= 40 << 20 and int(large.sum(dtype=torch.int64)) == 7 * (40 << 20)


def test_a_view_of_the_arena_is_the_same_memory_and_keeps_no_place() -> None:
    arena = TensorArena()
    tensor = arena.like(torch.empty(6, 4, dtype=torch.bfloat16))
    tensor.copy_(torch.arange(24).view(6, 4))
    part = tensor[1:, ::2]
    seen = arena.view(part)
    assert torch.equal(seen, part) and seen.data_ptr() == part.data_ptr() and seen.stride() == part.stride()
    place = tensor.data_ptr()
    del tensor, part
    assert arena.like(torch.empty(6, 4, dtype=torch.bfloat16)).data_ptr() == place
    elsewhere = torch.empty(3)
    assert arena.view(elsewhere) is elsewhere
