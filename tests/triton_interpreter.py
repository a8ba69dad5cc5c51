"""Where Triton kernels run in the tests: on the GPU when there is one, else in Triton's interpreter on CPU tensors.

Imported by conftest files, before anything imports Triton: Triton makes the choice when it defines its own library.
"""

import os
import sys
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

_is_late = "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"

if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


def require_triton() -> None:
    """Skip the module without Triton; without a GPU make the interpreter ready."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if DEVICE.type == "cpu":
        assert not _is_late, "Triton was imported before tests/triton_interpreter.py: import that in a conftest.py"
        _take_one_element_as_an_index()


def _take_one_element_as_an_index() -> None:
    """Triton 3.6 holds a scalar as an array of one element, which numpy from 2.4 on refuses to take as an index."""
    interpreter = sys.modules["triton.runtime.interpreter"]
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch
