"""Fixtures of the tests of calibration statistics."""

import pytest


@pytest.fixture(scope="session")
def llama():
    from tests.nn.statistics.models import tiny_llama  # needs torch, without which no test here is collected

    return tiny_llama()
