"""A step brings no number to the host, which would wait for the device there and end the capture of a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastsn
from dispatched import SYNCS, Counted
from op_calls import call
from regions import SCOPES


def model(impl: str) -> nn.Sequential:
    learnt = nn.Parameter(torch.tensor(1.2))
    return nn.Sequential(
        fastsn.BSSNConv2d(2, 4, 3, scale=learnt, impl=impl),
        fastsn.spectral_norm(nn.ConvTranspose2d(4, 3, 2), impl=impl, n_power_iterations=3),
        nn.Flatten(),
        fastsn.spectral_norm(nn.Linear(3 * 5 * 5, 2), impl=impl, variant="ssn", scale=torch.tensor(0.9)),
    )


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("training", [True, False])
def test_no_number_comes_to_the_host_in_a_step(training, scope, impl):
    net, x = model(impl).train(training), torch.randn(2, 2, 6, 6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = [vector.clone() for vector in net.buffers()]
    with Counted("aten") as counted:
        with SCOPES[scope](net):
            loss = net(x).square().sum() - net(-x).sum()
        loss.backward()
        optimizer.step()
    assert "convolution" in counted.names
    assert not SYNCS.intersection(counted.names)
    with Counted("aten") as counted:
        assert float(loss.detach()) != 0  # as a loop that logs every step does
    assert SYNCS.intersection(counted.names)
    vectors = [name.rpartition(".")[2] != "scale" for name, _ in net.named_buffers()]
    moved = [not torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True)]
    assert moved == [vector and training and scope != "step without advance" for vector in vectors]


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.filterwarnings("ignore")  # numpy's, in the interpreter
def test_launching_the_kernels_of_a_gpu_asks_for_no_number():
    from fastsn.triton import launch

    c = call([torch.randn(4, 3, 3), torch.randn(5, 6)], [0, 0], 3, "tensor")
    with Counted("aten") as counted:
        sigma, vectors = launch.call("power_iteration_", *c.iteration(), 2)
        outputs, mean = launch.call("rescale", c.weights, c.scales, sigma, vectors, *c.numbers())
        launch.call("rescale_backward", outputs, None, c.weights, c.scales, mean, vectors, *c.numbers())
    assert "empty" in counted.names  # results are made
    assert not SYNCS.intersection(counted.names)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_vectors_of_a_fused_model_stay_where_a_graph_would_replay_them(impl):
    net = fastsn.fuse(model(impl))
    pointers = [x.data_ptr() for x in net.buffers()]
    for training in (True, False, True):
        net.train(training)(torch.randn(2, 2, 6, 6)).sum().backward()
    assert [x.data_ptr() for x in net.buffers()] == pointers
