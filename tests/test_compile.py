"""Fused models under torch.compile: one graph, one call of each op, no recompilation once warm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastsn
from dispatched import Graphs, needs_kernels
from fastsn import ops
from networks import batch, network

# The default compiler, when it is imported.
torch_imports_what_it_deprecates = pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(run, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    run(x).square().sum().backward()
    optimizer.step()


def test_a_fused_model_in_training_and_evaluation():
    net = fastsn.fuse(network())
    twin, x, graphs = copy.deepcopy(net), batch(), Graphs()
    compiled = torch.compile(net, fullgraph=True, backend=graphs)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (net, twin)]
    counts = []
    for _ in range(5):
        train(compiled, x, optimizers[0])
        train(twin, x, optimizers[1])
        counts.append(graphs.frame_count)
    assert counts[1:] == [counts[1]] * 4
    assert all(ops == ["power_iteration_", "rescale"] for ops in graphs.ops)
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)
    for m in (net, twin):
        m.eval()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), twin(x))
    in_evaluation = graphs.ops[counts[-1] :]
    assert in_evaluation == [["power_iteration", "rescale"]]
    net.train()
    before = {k: v.clone() for k, v in net.named_buffers()}
    train(compiled, x, optimizers[0])
    assert len(graphs.ops) == counts[-1] + 1  # known already
    assert all(not torch.equal(before[k], v) for k, v in net.named_buffers())


def test_a_step_inside_a_compiled_function_is_one_call_for_all_uses():
    net, x, graphs = network(), batch(), Graphs()

    @torch.compile(fullgraph=True, backend=graphs)
    def both(x: Tensor) -> Tensor:
        with fastsn.step(net):
            return net(x).sum() - net(-x).sum()

    for _ in range(3):
        both(x).backward()
    assert graphs.ops == [["power_iteration_", "rescale"]] * graphs.frame_count
    assert graphs.frame_count <= 2


def test_iterations_do_not_grow_the_graph():
    found = []
    for n in (1, 20):
        graphs = Graphs()
        layer = fastsn.BSSNConv2d(3, 4, 3, n_power_iterations=n)
        torch.compile(layer, fullgraph=True, backend=graphs)(torch.randn(1, 3, 5, 5))
        found.append(graphs.op_count)
    assert found[0] == found[1] > 0


def test_a_compiled_model_of_single_layers_is_whole_too():
    net, x, graphs = network(), batch(), Graphs()
    compiled = torch.compile(net, fullgraph=True, backend=graphs)
    twin = copy.deepcopy(net)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), twin(x))
    assert graphs.frame_count == 1


@torch_imports_what_it_deprecates
@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", ["sn", "bssn"])
def test_two_forwards_and_a_backward_give_the_gradients_of_both(variant, fused, impl):
    """With the partition of the default compiler, which makes some results again in the backward."""
    scale = torch.tensor(1.3) if variant == "bssn" else 1.0
    make = fastsn.fuse if fused else nn.Sequential
    net = make(fastsn.spectral_norm(nn.Conv1d(4, 4, 3, padding=1), variant=variant, scale=scale, impl=impl))
    twin, x = copy.deepcopy(net), torch.randn(2, 4, 6)
    compiled = torch.compile(net, backend="aot_eager_decomp_partition")
    for modes in ((True, True), (False, True)):
        for model, run in ((net, compiled), (twin, twin)):
            first, second = (model.train(mode) and run(sign * x) for sign, mode in zip((1, -1), modes, strict=True))
            (first.sum() + second.square().sum()).backward()
    assert all(p.grad is not None for p in net.parameters())
    for ours, eager in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, eager.grad, rtol=1e-5, atol=1e-5)


@torch_imports_what_it_deprecates
def test_with_the_default_compiler():
    needs_kernels()  # compiled, the reference rounds differently
    net = fastsn.fuse(nn.Sequential(fastsn.BSSNConv2d(2, 4, 3, scale=1.2), nn.Flatten(), fastsn.SNLinear(64, 2)))
    twin, x = copy.deepcopy(net), batch()
    compiled = torch.compile(net, fullgraph=True)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (net, twin)]
    for _ in range(3):
        train(compiled, x, optimizers[0])
        train(twin, x, optimizers[1])
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)


def test_cuda_graphs_of_the_compiler_leave_the_ops_out():
    """Their tables on the device outlive the call; a graph captured after a step has run may have them."""
    from torch._inductor.utils import is_cudagraph_unsafe_fx_node

    graph = torch.fx.Graph()
    for op in (ops.power_iteration, ops.power_iteration_, ops.rescale, ops.rescale_backward):
        assert is_cudagraph_unsafe_fx_node(graph.call_function(op))
