"""Channels that fill no whole vectors: the C++ kernels work on 16 floats or 8 doubles at a time, and in channels_last
weights every kernel position ends in such a rest. Nothing may be read from, or written to, what lies behind it."""

import pytest
import torch

from op_calls import alternating, call

LANES = {torch.float32: 16, torch.float64: 8, torch.bfloat16: 16, torch.float16: 16}
KERNELS = ((3, 3), (4, 4), (1, 2))


def drawn(channels: int, kernel: tuple[int, int], dtype: torch.dtype, elements: int = 140_000) -> torch.Tensor:
    """A channels_last weight, by default of more than one piece of work."""
    rows = elements // (channels * kernel[0] * kernel[1]) + 1
    return torch.randn(rows, channels, *kernel).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", LANES, ids=str)
@pytest.mark.parametrize("views", [1, 2, 3])
def test_the_same_bits_fifty_times_on_any_number_of_threads(dtype, views, threads):
    lanes = LANES[dtype]
    channels = [lanes - 3, *range(2 * lanes, 3 * lanes)]
    weights = [drawn(b, kernel, dtype) for b in channels for kernel in KERNELS]
    weights += [w.transpose(0, 1) for w in weights[:3]]  # ConvTranspose: output channels second
    c = call(weights, [0] * (len(weights) - 3) + [1] * 3, views, v_first=alternating(len(weights)))
    threads(1)
    expected = c.iterate()
    for count in (2, 4):
        threads(count)
        for _ in range(25):
            assert all(map(torch.equal, expected, c.iterate()))


@pytest.mark.parametrize("dtype", LANES, ids=str)
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1])
def test_what_is_not_finite_in_one_weight_stays_there(dtype, views, n):
    """Weights are worked on in one memory, one behind the other; what is left over in it is of earlier calls."""
    healthy = [drawn(b, kernel, dtype, 2000) for b in (1, 5, LANES[dtype] + 1) for kernel in KERNELS]
    bad = [torch.full_like(w, value) for w, value in zip(healthy, (torch.nan, torch.inf, torch.nan) * 3, strict=True)]
    mixed = [w for pair in zip(bad, healthy, bad, strict=True) for w in pair]
    together = call(mixed, [0] * len(mixed), views, v_first=alternating(len(mixed)))
    per_weight = len(together.u) // (3 * len(healthy))
    together.iterate(1)
    sigma, _ = together.iterate(n)
    for i, w in enumerate(healthy):
        alone = call([w], [0], views, v_first=together.v_first[3 * i + 1])
        begin = (3 * i + 1) * per_weight
        alone.u, alone.v = together.u[begin : begin + per_weight], together.v[begin : begin + per_weight]
        found = sigma[begin : begin + per_weight]
        assert found.isfinite().all()
        assert torch.equal(found, alone.iterate(n)[0])


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("power", [-100, 60, 100])
def test_a_power_of_two_in_a_channels_last_weight_is_one_in_sigma(views, power):
    for b in (1, 17, 24, 72):
        for kernel in KERNELS:
            c = call([drawn(b, kernel, torch.float32, 3000)] * 2, [0, 0], views, v_first=[0, 1])
            sigma, vectors = c.iterate(2)
            c.weights = [w * 2.0**power for w in c.weights]
            scaled, same = c.iterate(2)
            assert torch.equal(vectors, same)
            assert torch.equal(sigma * 2.0**power, scaled)
