"""What all tests share."""

import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_intra_op_thread() -> None:
    """Small tensors are faster on one thread, and sums have one order. Torch is not imported for it: the
    tests that need torch have done so when they were collected."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    # Torch scripts its forward-mode rules when the first dual number is made, and warns of itself.
    config.addinivalue_line("filterwarnings", r"ignore:.torch\.jit\.script. is:DeprecationWarning:torch\.jit")
