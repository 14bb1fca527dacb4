"""What only a GPU can show: streams, graphs, nothing that waits for the device, devices that do not belong together."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsn
from conftest import ON
from on_a_gpu import waits_are_errors

# Not wherever there is a GPU: without FASTSN_TEST_ON=cuda the kernels are those of the interpreter, for CPU tensors.
pytestmark = pytest.mark.skipif(ON != "cuda", reason="needs a GPU, and FASTSN_TEST_ON=cuda")


def discriminator(impl: str = "auto") -> nn.Sequential:
    torch.manual_seed(3)
    shapes = ((3, 32, 3), (32, 32, 4), (32, 64, 3), (64, 64, 4))
    layers: list[nn.Module] = []
    for i, o, k in shapes:
        layers += [fastsn.BSSNConv2d(i, o, k, stride=2 - k % 2, padding=1, scale=1.4, impl=impl), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.Flatten(), fastsn.SNLinear(64 * 8 * 8, 1, impl=impl)).cuda()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, real: Tensor, fake: Tensor, scope=fastsn.step) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    with scope(net):
        loss = F.relu(1 - net(real)).mean() + F.relu(1 + net(fake)).mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def images() -> tuple[Tensor, Tensor]:
    real, fake = torch.randn(2, 8, 3, 32, 32, device="cuda")
    return real, fake


def test_the_kernels_serve():
    assert fastsn.backends()["triton"].available
    layer = fastsn.BSSNConv2d(3, 4, 3, impl="triton", device="cuda")
    layer(torch.randn(1, 3, 8, 8, device="cuda")).sum().backward()


@pytest.mark.parametrize("scope", [fastsn.step, nullcontext], ids=["step", "fuse"])
def test_a_captured_step_replayed_a_hundred_times_is_the_eager_one(scope):
    real, fake = images()
    eager, captured = discriminator(), discriminator()
    if scope is nullcontext:
        fastsn.fuse(eager)
        fastsn.fuse(captured)
    # Not Adam: its first steps, of one size whatever the gradient's, make more of a last bit than any tolerance. So
    # slow that the loss is far from 0 at the end, where nothing would move any more.
    optimizers = [torch.optim.SGD(net.parameters(), 1e-4) for net in (eager, captured)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train(captured, optimizers[1], real, fake, scope)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = train(captured, optimizers[1], real, fake, scope)
    for _ in range(100):
        graph.replay()
    for _ in range(103):
        expected = train(eager, optimizers[0], real, fake, scope)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
    for name, x in eager.state_dict().items():
        torch.testing.assert_close(
            captured.state_dict()[name], x, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_compiled_model_that_has_not_run_before():
    net, eager = discriminator(), discriminator()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = images()[0]
    torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-5)


def test_a_warm_step_waits_for_nothing():
    net = discriminator()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    real, fake = images()
    for _ in range(3):
        train(net, optimizer, real, fake)
    with waits_are_errors():
        for _ in range(3):
            train(net, optimizer, real, fake)


def test_runs_give_the_same_bits():
    found = []
    for _ in range(5):
        net = discriminator()
        with fastsn.step(net):
            weights = [layer.normalized()[0] for layer in net if hasattr(layer, "normalized")]
        torch.autograd.backward(weights, [w.detach().cos() for w in weights])
        found.append([*weights, *(p.grad for p in net.parameters() if p.grad is not None), *net.buffers()])
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


def test_kernels_and_reference_agree_on_large_weights():
    for shape in ((512, 256, 3, 3), (1024, 512, 3, 3), (4096, 1024), (1, 8192), (1024, 64, 41)):
        weight = torch.randn(shape, device="cuda")
        make = fastsn.SNLinear if len(shape) == 2 else fastsn.BSSNConv1d if len(shape) == 3 else fastsn.BSSNConv2d
        arguments = (shape[1], shape[0], *shape[2:3])
        layers = []
        for impl in ("triton", "reference"):
            torch.manual_seed(0)
            layer = make(*arguments, impl=impl, device="cuda")
            with torch.no_grad():
                layer.weight.copy_(weight)
            layers.append(layer)
        layers[1].load_state_dict(layers[0].state_dict())
        ours, theirs = (layer.normalized()[0] for layer in layers)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
        gradient = torch.randn_like(ours)
        ours.backward(gradient)
        theirs.backward(gradient)
        torch.testing.assert_close(layers[0].weight.grad, layers[1].weight.grad, rtol=1e-4, atol=1e-5)


def test_another_stream_is_followed():
    net, expected = discriminator(), discriminator()
    stream = torch.cuda.Stream()
    for _ in range(20):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), fastsn.step(net):
            pass
        torch.cuda.current_stream().wait_stream(stream)
        with fastsn.step(expected):
            pass
    assert all(map(torch.equal, net.buffers(), expected.buffers()))


def test_autocast_writes_the_weight_in_its_dtype():
    net = discriminator()
    with torch.autocast("cuda", torch.bfloat16), fastsn.step(net):
        assert net[0].normalized()[0].dtype == torch.bfloat16
        net(images()[0]).float().sum().backward()
    assert net[0].weight.grad.dtype == torch.float32


def test_channels_last_is_read_and_kept():
    net, plain = discriminator().to(memory_format=torch.channels_last), discriminator()
    ours, theirs = net[2].normalized()[0], plain[2].normalized()[0]
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_different_gpus_in_one_step():
    net = discriminator()
    net[2].to("cuda:1")
    with fastsn.step(net):
        assert net[2].normalized()[0].device == torch.device("cuda", 1)


def test_cpu_and_gpu_layers_in_one_step():
    net = discriminator()
    net[2].cpu()
    with fastsn.step(net):
        assert net[2].normalized()[0].device.type == "cpu"
        assert net[0].normalized()[0].is_cuda


def test_vectors_left_behind_on_the_cpu_are_an_error():
    layer = fastsn.SNLinear(4, 4, device="cuda")
    layer.spectral_norm._u = layer.spectral_norm._u.cpu()
    with pytest.raises(ValueError, match="must be on cuda:0, got cpu"):
        layer.normalized()


def test_a_float64_layer_is_served_by_the_reference():
    layer = fastsn.SNLinear(4, 4, device="cuda", dtype=torch.float64)
    assert layer.normalized()[0].dtype == torch.float64
    with pytest.raises(TypeError, match="impl='triton' needs float32, float16 or bfloat16 weights"):
        fastsn.SNLinear(4, 4, device="cuda", dtype=torch.float64, impl="triton").normalized()
