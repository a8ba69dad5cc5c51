"""Suits a loaded model to the CPU: threads shared out, linears packed, what lies between them in one call each.

Stock classes stay; single modules are swapped after a trial in which they gave what the stock ones give. Knows nothing
of requests and adapters.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from adapters.host_memory import HostMemory
from adapters.lora_experts import bound_experts
from adapters.ops import bf16_dot
from adapters.ops.thread_team import ThreadTeam, start_team
from server.engine.expert_panels import pack_experts
from server.engine.fused_mlp import fuse_mlps
from server.engine.fused_norm import fuse_norms
from server.engine.fused_rotary import fuse_rotary
from server.engine.packed_linear import pack_linears
from server.engine.panel_linear import PanelLinear
from server.engine.precompile import compile_missing


def suit(
    model: PreTrainedModel, groups: Sequence[Sequence[str]], cpu_threads: int | None
) -> Callable[[], AbstractContextManager[None]]:
    """Swap what the CPU has better; returns the context in which a forward pass has all its threads.

    `groups` names linears that read one input; `cpu_threads` None = chosen here.
    """
    own_product = model.dtype is torch.bfloat16 and bf16_dot.is_supported()
    has_experts = bf16_dot.is_supported() and any(bound_experts(module) is not None for module in model.modules())
    team = _share_out_threads(cpu_threads, own_product=own_product, own_experts=has_experts)
    if own_product:
        compile_missing(team.num_threads)
    loaded = list(model.parameters())
    num_packed = pack_experts(model, team) if has_experts else 0
    if pack_linears(model, groups, team).panels or num_packed:
        _leave_file(model, loaded)
    del loaded
    fuse_norms(model)
    fuse_rotary(model)
    fuse_mlps(model, team)
    products = {id(module.product): module.product for module in model.modules() if isinstance(module, PanelLinear)}

    @contextmanager
    def step() -> Iterator[None]:
        try:
            with team.step() if own_product else nullcontext():
                yield
        finally:
            for product in products.values():  # a tensor object may come again with other numbers
                product.forget()

    return step


def _leave_file(model: PreTrainedModel, loaded: Sequence[nn.Parameter]) -> None:
    """Copy those of the loaded parameters that packing left. One tensor in the mapped file of weights keeps the whole
    file in memory, beside the packed copy of the rest."""
    memory, from_file = HostMemory(), {id(parameter) for parameter in loaded}
    for parameter in model.parameters():  # a tied one comes once
        if id(parameter) in from_file:
            parameter.data = memory.keep(parameter)


def _share_out_threads(wanted: int | None, *, own_product: bool, own_experts: bool = False) -> ThreadTeam:
    """The team our kernels run on. Two pools of threads would take the cores from each other, so torch is left with one
    thread where our kernels do the products, and our team has one where torch does them. Where they do those of experts
    alone, it has as many, which sleep but for those (expert_panels.py)."""
    asked, num_cores = wanted or _asked_of_openmp(), len(os.sched_getaffinity(0))
    if own_product:
        torch.set_num_threads(1)
        return start_team(asked or num_cores)
    # OpenMP's threads wait for each other by spinning: one core stays free for connections and tokenisation.
    torch.set_num_threads(asked or max(1, num_cores - 1))
    return start_team(torch.get_num_threads() if own_experts else 1)


def _asked_of_openmp() -> int | None:
    """The number in OMP_NUM_THREADS, which limits other programs too; None without one."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdigit() and int(first) > 0 else None
