"""Touched memory is there and keeps what stands in it, also while somebody writes."""

import resource

import torch

from adapters.ops.page_toucher import touch_in_background


def _resident_pages() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])


def test_pages_are_there_and_numbers_stay() -> None:
    tensors = [torch.empty(64 << 20, dtype=torch.uint8), torch.empty(3, dtype=torch.bfloat16)]
    before = _resident_pages()
    touch_in_background(tensors).join()
    assert (_resident_pages() - before) * resource.getpagesize() >= 63 << 20
    written = torch.randint(0, 255, (8 << 20,), dtype=torch.uint8)
    copy = written.clone()
    touch_in_background([written, copy[1:4096], copy[:1]]).join()
    assert torch.equal(written, copy)


def test_a_writer_beside_loses_nothing() -> None:
    for round_ in range(20):
        target = torch.empty(4 << 20, dtype=torch.uint8)
        thread = touch_in_background([target])
        target.fill_(round_)
        thread.join()
        assert int(target.min()) == int(target.max()) == round_
