"""Fixtures of the model's tests: one thread and one seed for each test, and the small
backbones.
"""

import pytest
import torch

from tests.helpers.models import BACKBONES


@pytest.fixture(autouse=True)
def seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=BACKBONES)
def backbone(request):
    return BACKBONES[request.param]()
