"""The tests of this folder run Triton kernels; importing the module below decides where."""

import tests.triton_interpreter  # noqa: F401
