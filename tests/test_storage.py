"""Memory of large results is used again once nobody holds it, and never before."""

from __future__ import annotations

import ctypes
import gc
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastsn
from op_calls import Call, call

pytestmark = pytest.mark.skipif(not fastsn.backends()["cpp"].available, reason="storage of the C++ kernels")

SHAPE = (600, 700)  # 1.7 MB


@pytest.fixture
def large() -> Call:
    return call([torch.randn(SHAPE)], [0], [1])


def result(c: Call) -> Tensor:
    with torch.no_grad():
        return c.rescale(*c.iterate())[0][0]


def test_the_memory_of_a_result_that_is_gone_is_used_again(large):
    first = result(large)
    pointer = first.data_ptr()
    del first
    assert result(large).data_ptr() == pointer


HOLDERS = {
    "the tensor": lambda x: x,
    "a view": lambda x: x[3:5, 7],
    "a detached copy": lambda x: x.detach(),
    "its transposed view": lambda x: x.t(),
    "its storage": lambda x: x.untyped_storage(),
    "a numpy array": lambda x: x.numpy(),
    "a saved tensor": lambda x: (x * torch.ones((), requires_grad=True)).grad_fn,
    "a module": lambda x: nn.ParameterList([nn.Parameter(x)]),
    "dlpack": lambda x: torch.from_dlpack(x),
    "a hook's closure": lambda x: (lambda: x.sum()),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_that_somebody_holds_is_not_touched(large, holder):
    x = result(large)
    expected, pointer = x.clone(), x.data_ptr()
    held = HOLDERS[holder](x)
    storage = torch.tensor([], dtype=x.dtype).set_(x.untyped_storage())  # to look at it afterwards
    weak = storage[: x.numel()].view(SHAPE)
    del x, storage
    others = [result(call([torch.randn(SHAPE)], [0], [1])) for _ in range(5)]
    assert pointer not in {other.data_ptr() for other in others}
    assert torch.equal(weak, expected)
    del held


@pytest.mark.parametrize("holder", ["a view", "a detached copy", "a saved tensor", "a numpy array", "dlpack"])
def test_memory_is_free_when_the_last_holder_goes(large, holder):
    x = result(large)
    pointer, held = x.data_ptr(), HOLDERS[holder](x)
    del x
    assert result(large).data_ptr() != pointer
    del held
    gc.collect()
    assert pointer in {y.data_ptr() for y in [result(large) for _ in range(3)]}


def test_gradients_of_an_earlier_step_keep_their_values():
    """A user collects gradients and normalized weights of several steps, as accumulation and logging do."""
    layer = fastsn.spectral_norm(nn.Linear(700, 600), variant="bssn", scale=1.2)
    kept, copies = [], []
    for _ in range(4):
        w = layer.weight
        (w.square().sum() / 2).backward()
        kept += [w.detach(), layer.parametrizations.weight.original.grad]
        copies += [x.clone() for x in kept[-2:]]
        layer.parametrizations.weight.original.grad = None
    assert all(map(torch.equal, kept, copies))


def test_a_graph_that_waits_for_its_backward_keeps_its_weights():
    layer = fastsn.spectral_norm(nn.Linear(700, 600))
    original = layer.parametrizations.weight.original
    losses, expected = [], []
    for _ in range(3):
        loss = layer.weight.square().sum()
        expected += torch.autograd.grad(loss, original, retain_graph=True)
        losses.append(loss)
    for loss, gradient in zip(losses, expected, strict=True):
        assert torch.equal(torch.autograd.grad(loss, original)[0], gradient)


def test_idle_memory_is_bounded_by_what_was_in_use_at_once(large):
    pointers = set()
    for _ in range(50):
        pointers.add(result(large).data_ptr())
    assert len(pointers) <= 2


def resident() -> int:
    """Bytes of this process, without what has been freed and glibc keeps: where other tests have left a hole in its
    heap that a block fits in, it is taken from there, and freed to there."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_idle_memory_of_other_sizes_makes_room():
    """Six blocks of 32 MB that are free again do not stay beside ten of 18 MB that are in use."""

    def results(count: int, rows: int) -> list[Tensor]:
        c = call([torch.randn(rows, 4096)], [0], [1])
        return [result(c) for _ in range(count)]

    before = resident()
    results(6, 2048)
    second = results(10, 1150)
    assert resident() - before < 330e6
    assert len({x.data_ptr() for x in second}) == 10


def test_threads_never_share_a_block():
    errors = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        c = call([torch.randn(SHAPE, generator=generator)], [0], [1])
        expected = result(c)
        for _ in range(20):
            if not torch.equal(result(c), expected):
                errors.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_results_can_be_resized_shared_and_pickled(large, tmp_path):
    x = result(large)
    torch.save(x, tmp_path / "x.pt")
    assert torch.equal(torch.load(tmp_path / "x.pt"), x)
    before = x.clone()
    x.resize_(2 * SHAPE[0], SHAPE[1])
    assert torch.equal(x[: SHAPE[0]], before)
    assert torch.equal(before.share_memory_(), x[: SHAPE[0]])


def test_memory_is_given_back_when_asked_for():
    held = result(call([torch.randn(4096, 4096)], [0], [1]))
    copy = held[::512].clone()
    result(call([torch.randn(4096, 4096)], [0], [1]))
    before = resident()
    assert fastsn.release_memory() >= 64e6
    assert before - resident() > 60e6
    assert fastsn.release_memory() == 0
    assert torch.equal(held[::512], copy)  # what somebody holds stays


def test_memory_that_is_not_used_for_some_steps_is_given_back():
    fastsn.release_memory()
    result(call([torch.randn(4096, 4096)], [0], [1]))
    before = resident()
    other = call([torch.randn(512, 512) for _ in range(4)], [0] * 4, [1] * 4)
    state = other.iterate()
    for _ in range(150):  # another model goes on
        with torch.no_grad():
            other.rescale(*state)
    assert before - resident() > 40e6
