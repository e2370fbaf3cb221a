"""What the tests of backbones share."""

import pytest


@pytest.fixture(autouse=True)
def _declared(torchvision_operators):
    """Every library's import finds a torchvision that works."""
