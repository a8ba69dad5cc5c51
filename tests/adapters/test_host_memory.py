"""Tensors side by side in large blocks do not touch each other, and outlive who gave them out."""

import torch

from adapters.host_memory import HostMemory


def test_tensors_are_apart_and_aligned() -> None:
    memory = HostMemory()
    tensors = [memory.empty(3, 5 + i, dtype=torch.bfloat16) for i in range(50)]
    for number, tensor in enumerate(tensors):
        assert tensor.shape == (3, 5 + number) and tensor.is_contiguous() and tensor.data_ptr() % 128 == 0
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))


def test_one_larger_than_a_block_and_one_of_nothing() -> None:
    memory = HostMemory()
    large = memory.empty(70 << 20, dtype=torch.uint8)
    nothing, after = memory.empty(0, 4, dtype=torch.float32), memory.empty(2, dtype=torch.float32)
    large.fill_(1)
    after.fill_(2.0)
    assert nothing.shape == (0, 4) and int(large[-1]) == 1 and after.tolist() == [2.0, 2.0]


def test_what_is_kept_is_a_contiguous_copy() -> None:
    original = torch.arange(12.0).view(3, 4)
    kept = HostMemory(HostMemory.taken(48)).keep(original.T)
    original.zero_()
    assert kept.is_contiguous() and torch.equal(kept, torch.arange(12.0).view(3, 4).T)


def test_memory_is_given_back_to_the_system() -> None:
    def mapped() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0])

    before = mapped()
    kept = [HostMemory(8 << 20).empty(8 << 20, dtype=torch.uint8).fill_(1) for _ in range(8)]
    held = mapped()
    del kept
    assert held - before >= 8 * (8 << 20) // 4096 and mapped() - before <= (8 << 20) // 4096


def test_a_tensor_holds_its_block() -> None:
    tensor = HostMemory().empty(1000, dtype=torch.float32).fill_(3.0)
    others = [HostMemory().empty(1000, dtype=torch.float32).fill_(4.0) for _ in range(20)]
    assert bool((tensor == 3.0).all()) and len(others) == 20
