"""Optimisers that spare the compiler take the same steps as PyTorch's."""

import copy

import pytest
import torch
from torch import nn

from upfeat import optimisers


@pytest.mark.parametrize("name", ["NAdam", "LBFGS"])
def test_the_same_bits(name):
    torch.manual_seed(0)
    x = torch.randn(16, 5)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    found = []
    for network, module in ((ours, optimisers), (theirs, torch.optim)):
        optimiser = getattr(module, name)(network.parameters(), lr=0.1)
        for step in range(5):
            if step == 3:  # as after a resume
                state = copy.deepcopy(optimiser.state_dict())
                optimiser = getattr(module, name)(network.parameters(), lr=0.5)
                optimiser.load_state_dict(state)

            def closure(network=network, optimiser=optimiser):
                optimiser.zero_grad()
                loss = network(x).square().mean()
                loss.backward()
                return loss

            optimiser.step(closure) if name == "LBFGS" else (closure(), optimiser.step())
        found.append([*network.parameters()])
        assert not any(p.grad_fn for p in network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
