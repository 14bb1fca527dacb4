"""Batch norms of parts of the batch are torch's of every part on its own, however many ranks hold them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gan import distributed, group_mean
from gan.config import Config
from gan.models.batch_norm import BatchNorm1d, BatchNorm2d, ConditionalBatchNorm2d
from gan.training import Training

KINDS = {"1d": (BatchNorm1d, nn.BatchNorm1d, (8, 3)), "2d": (BatchNorm2d, nn.BatchNorm2d, (8, 3, 4, 5))}
ALIKE = {"rtol": 1e-9, "atol": 1e-12}


def examples(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x, and the slope of a loss at the output."""
    draw = torch.Generator().manual_seed(3)
    shift = torch.arange(float(shape[0])).view(-1, *[1] * (len(shape) - 1))  # every group has another mean
    x, slope = (torch.randn(shape, generator=draw, dtype=dtype) for _ in range(2))
    return x + shift, slope


def disturbed(norm: nn.Module) -> nn.Module:
    """Parameters and statistics that are not those of the beginning."""
    draw = torch.Generator().manual_seed(4)
    for x in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        x.uniform_(0.5, 1.5, generator=draw)
    return norm


def results(norm: nn.Module, x: Tensor, slope: Tensor) -> dict[str, Tensor]:
    """Output, gradients and statistics."""
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * slope).sum().backward()
    gradients = {"x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return {"y": y.detach(), **gradients, "mean": norm.running_mean, "var": norm.running_var}


def of_torch(kind: str, x: Tensor, slope: Tensor, groups: int) -> dict[str, Tensor]:
    """``results`` of torch's batch norm of every group on its own."""
    parts = zip(x.chunk(groups), slope.chunk(groups), strict=True)
    each = [results(disturbed(KINDS[kind][1](3, dtype=x.dtype)), *part) for part in parts]
    joined = {name: torch.cat([r[name] for r in each]) for name in ("y", "x")}
    summed = {name: torch.stack([r[name] for r in each]).sum(0) for name in ("weight", "bias")}
    return joined | summed | {name: torch.stack([r[name] for r in each]).mean(0) for name in ("mean", "var")}


@pytest.mark.parametrize("kind", KINDS)
def test_one_group_has_torchs_bits_and_names(kind):
    ours, torchs, shape = KINDS[kind]
    x, slope = examples(shape, torch.float32)
    found, expected = (results(disturbed(norm(3)), x, slope) for norm in (ours, torchs))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert list(ours(3).state_dict()) == list(torchs(3).state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [2, 4])
def test_groups_are_normalized_apart(kind, groups):
    ours, _, shape = KINDS[kind]
    x, slope = examples(shape)
    norm = disturbed(ours(3, groups).double())
    torch.testing.assert_close(results(norm, x, slope), of_torch(kind, x, slope, groups), **ALIKE)
    assert int(norm.num_batches_tracked) == 1
    if kind == "2d":
        given = x.to(memory_format=torch.channels_last)
        assert norm(given).is_contiguous(memory_format=torch.channels_last)


def test_evaluation_is_torchs_whatever_the_groups():
    x, _ = examples((3, 3, 4, 5))  # which two groups could not share
    ours, torchs = (disturbed(norm.double()).eval() for norm in (BatchNorm2d(3, 2), nn.BatchNorm2d(3)))
    assert torch.equal(ours(x), torchs(x))


@pytest.mark.parametrize("architecture", ["bsn", "bsn-resnet"])
@pytest.mark.parametrize("groups", [1, 2])
def test_statistics_of_groups_stay_in_discriminator_steps(architecture, groups):
    small = {"architecture": architecture, "width": 1 / 64, "batch_size": 4, "n_dis": 2}
    config = Config(name="x", bn_groups=groups, batch_norm_in_d_steps=False, z_of_g="fresh", **small)
    training = Training(config, 3, 0, torch.device("cpu"))
    norms = [m for m in training.generator.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    seen: list[Tensor] = []
    last = norms[-1]
    last.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    training.advance(iter([(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), None)] * 2))
    assert len(seen) == 3
    assert {int(norm.num_batches_tracked) for norm in norms} == {1}
    means = torch.stack([part.mean((0, 2, 3)) for part in seen[-1].chunk(groups)]).mean(0)
    torch.testing.assert_close(last.running_mean, 0.1 * means)


@pytest.mark.parametrize("groups", [1, 2])
def test_conditional_batch_norm_has_factors_of_each_class(groups):
    x, slope = examples((8, 3, 4, 5))
    y = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    norm = ConditionalBatchNorm2d(3, 2, groups, 1e-3).double()
    assert {name: tuple(p.shape) for name, p in norm.named_parameters()} == {"gamma": (2, 3), "beta": (2, 3)}
    plain = torch.cat([F.batch_norm(part, None, None, training=True, eps=1e-3) for part in x.chunk(groups)])
    torch.testing.assert_close(norm(x, y), plain, **ALIKE)  # it begins without factors
    nn.init.normal_(norm.gamma), nn.init.normal_(norm.beta)
    each = [norm.gamma[c].view(3, 1, 1) * x + norm.beta[c].view(3, 1, 1) for x, c in zip(plain, y, strict=True)]
    found, expected = norm(x, y), torch.stack(each)
    torch.testing.assert_close(found, expected, **ALIKE)
    gradients = [torch.autograd.grad((y * slope).sum(), list(norm.parameters())) for y in (found, expected)]
    torch.testing.assert_close(*gradients, **ALIKE)


def test_groups_that_ranks_cannot_share():
    norm = BatchNorm2d(3, 2)
    norm.ranks = 3
    with pytest.raises(ValueError, match="bn_groups must be a multiple or a divisor of the 3 ranks, got 2"):
        norm(torch.randn(4, 3, 2, 2))


@pytest.fixture
def over_ranks(monkeypatch):
    """``over_ranks(size, work)`` is [work(0), work(1), ...], each from a thread that takes itself for that rank."""

    def run(size: int, work: Callable[[int], nn.Module | Tensor]) -> list[object]:
        own, barrier, given = threading.local(), threading.Barrier(size, timeout=10), [torch.empty(0)] * size

        def mean_of_group(x: Tensor, groups: int) -> Tensor:
            each = size // groups
            first = own.rank // each * each
            given[own.rank] = x
            barrier.wait()
            mean = torch.stack(given[first : first + each]).mean(0)
            barrier.wait()
            return mean

        def begin(rank: int) -> object:
            own.rank = rank
            return work(rank)

        monkeypatch.setattr(group_mean, "mean_of_group", mean_of_group)
        monkeypatch.setattr(distributed, "ranks", lambda: distributed.Ranks(own.rank, size))
        with ThreadPoolExecutor(size) as threads:
            return list(threads.map(begin, range(size)))

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "groups"), [(2, 1), (2, 2), (2, 4), (4, 2), (4, 1)])
def test_groups_do_not_depend_on_the_ranks(over_ranks, kind, ranks, groups):
    ours, _, shape = KINDS[kind]
    x, slope = examples(shape)
    expected = of_torch(kind, x, slope, groups)
    x.requires_grad_()

    def work(rank: int) -> tuple[nn.Module, Tensor]:
        norm = disturbed(ours(3, groups).double())
        return norm, norm(x.chunk(ranks)[rank])

    norms, outputs = zip(*over_ranks(ranks, work), strict=True)
    y = torch.cat(outputs)
    (y * slope).sum().backward()
    means = {
        name: torch.stack([getattr(norm, f"running_{name}") for norm in norms]).mean(0) for name in ("mean", "var")
    }
    sums = {name: torch.stack([getattr(norm, name).grad for norm in norms]).sum(0) for name in ("weight", "bias")}
    torch.testing.assert_close({"y": y.detach(), "x": x.grad, **sums, **means}, expected, **ALIKE)


def test_the_variance_of_a_group_over_ranks_does_not_cancel(over_ranks):
    x, _ = examples((8, 3, 4, 5), torch.float32)
    x = 1e4 + x - x.mean()
    y = torch.cat(over_ranks(2, lambda rank: BatchNorm2d(3, 1)(x.chunk(2)[rank])))
    torch.testing.assert_close(y.double(), nn.BatchNorm2d(3, dtype=torch.float64)(x.double()), rtol=0, atol=2e-3)
