"""A call of the Triton kernels is recognized by what its tensors look like and where they lie, whatever objects they
are: a tensor that has changed under the same name is read as it is now."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from conftest import ON
from fastsn import ops, tensor_lists
from fastsn.ops import cuda as gpu
from op_calls import Call, call

pytest.importorskip("triton")
from fastsn.triton import memory
from interpreted import launches_replaced

pytestmark = [pytest.mark.usefixtures("triton_kernels"), pytest.mark.skipif(ON == "cuda", reason="for the interpreter")]


@pytest.fixture(params=["as built", "in Python"], autouse=True)
def _lists(request, monkeypatch):
    """Lists are gone through by C++, if it has been built, and by Python."""
    if request.param == "in Python":
        monkeypatch.setattr(tensor_lists, "_built", lambda _, otherwise: otherwise)


def identified(tensors: list[Tensor]) -> tuple[Hashable, Hashable]:
    """The keys of a call with these among its tensors."""
    return tensor_lists.identify("power_iteration", (tensors, [], [], [0], [1], [0], 1))


def assert_right(c: Call) -> None:
    """Iteration, rescaling and gradient are those of the reference in float64."""
    e = c.exact()
    state = c.iterate()
    exact = ops.fallback.power_iteration(*e.iteration(), 1)
    outputs, mean = c.rescale(*state)
    true, true_mean = ops.fallback.rescale(e.weights, e.scales, *exact, *e.numbers())
    assert_gradients_right(c, [torch.randn_like(x) for x in outputs], outputs, mean, state[1])
    for x, y in zip((*state, *outputs), (*exact, *true), strict=True):
        rounding = 1e-5 if x.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(x.double(), y, rtol=rounding, atol=rounding)
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-5, atol=0)


def assert_gradients_right(
    c: Call, gradients: list[Tensor], bases: list[Tensor], mean: Tensor, vectors: Tensor
) -> None:
    given = (gradients, None, bases, [], mean, vectors)
    exact = ([g.double() for g in gradients], None, [x.double() for x in bases], [], mean.double(), vectors.double())
    (ours, _), (true, _) = (
        ops.rescale_backward(*given, *c.numbers()),
        ops.fallback.rescale_backward(*exact, *c.exact().numbers()),
    )
    for x, y in zip(ours, true, strict=True):
        rounding = 1e-5 if x.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(x.double(), y, rtol=rounding, atol=rounding)


def other_memory(x: Tensor) -> None:
    x.data = x.data.clone() + 1


def channels_last(x: Tensor) -> None:
    x.data = x.data.contiguous(memory_format=torch.channels_last)


def half(x: Tensor) -> None:
    x.data = x.data.half()


def not_aligned(x: Tensor) -> None:
    x.data = torch.randn(x.numel() + 1)[1:].view(x.shape)


def other_strides_at_the_same_place(x: Tensor) -> None:
    x.as_strided_((6, 4, 3, 3), (4, 1, 72, 24))


def part_of_itself(x: Tensor) -> None:
    x.set_(x[:, :, :, :2])


CHANGES = (other_memory, channels_last, half, not_aligned, other_strides_at_the_same_place, part_of_itself)


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_changed_under_the_same_name_is_read_as_it_is_now(change):
    weights = [torch.randn(6, 4, 3, 3), torch.randn(5, 4, 3, 3)]
    before = call(weights, [0, 0])
    assert_right(before)
    change(weights[0])
    after = call(weights, [0, 0])
    assert after.weights[0] is before.weights[0]
    assert_right(after)


def test_vectors_that_were_replaced_or_are_no_longer_dense_are_found():
    c = call([torch.randn(6, 4, 3)], [0])
    assert_right(c)
    for x in (*c.u, *c.v):
        x.set_(torch.nn.functional.normalize(torch.randn_like(x), dim=0))
    assert_right(c)
    for x in (*c.u, *c.v):
        x.set_(torch.nn.functional.normalize(torch.randn(2 * x.numel()), dim=0)[::2])
    assert_right(c)
    before = [x.clone() for x in (*c.u, *c.v)]
    _, vectors = c.iterate(in_place=True)
    assert not any(map(torch.equal, before, (*c.u, *c.v)))
    assert torch.equal(vectors, torch.cat([x for pair in zip(c.u, c.v, strict=True) for x in pair]))


def test_an_argument_that_has_become_wrong_is_an_error_each_time():
    c = call([torch.randn(6, 4, 3)], [0])
    assert_right(c)
    c.u[0].resize_(5)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"u\[0\] must have shape \[6\], got \[5\]"):
            c.iterate()
    c.u[0].resize_(6)
    c.u[0].data = c.u[0].data.double()
    with pytest.raises(TypeError, match=r"u\[0\] must be torch.float32, got torch.float64"):
        c.iterate()


@pytest.mark.parametrize(
    "odd",
    [
        lambda g: torch.ones(()).expand(g.shape),
        lambda g: torch.randn(g.shape[::-1]).permute(3, 2, 1, 0),
        lambda g: torch.randn_like(g).contiguous(memory_format=torch.channels_last),
        lambda g: torch.randn(2 * g.numel())[::2].view(g.shape),
        lambda g: torch.randn(g.numel() + 1)[1:].view(g.shape),
        lambda g: torch.randn_like(g).half(),
    ],
    ids=["expanded", "transposed", "channels_last", "every second", "not aligned", "half"],
)
def test_gradients_of_any_layout_come_after_usual_ones(odd):
    c = call([torch.randn(6, 4, 3, 3), torch.randn(5, 4, 3, 3)], [0, 0])
    sigma, vectors = c.iterate()
    outputs, mean = c.rescale(sigma, vectors)
    usual = [torch.randn_like(x) for x in outputs]
    for gradients in (usual, [odd(usual[0]), usual[1]], usual):
        assert_gradients_right(c, gradients, outputs, mean, vectors)


def test_objects_that_are_gone_and_come_again_are_not_mixed_up():
    for i in range(12):
        assert_right(call([torch.randn(4 + i % 3, 3, 2), torch.randn(3, 5)], [0, 0], [3, 1]))


def test_what_is_remembered_of_calls_is_bounded(monkeypatch):
    monkeypatch.setattr(gpu, "_KNOWN", 4)
    with launches_replaced():
        for i in range(20):
            call([torch.randn(3, 2 + i)], [0], 1).iterate()
            assert len(gpu._prepared) <= 4


def test_lists_that_differ_in_anything_a_kernel_depends_on_have_different_keys():
    x = torch.zeros(64)
    with torch.inference_mode():
        made = torch.zeros(2, 3)
    lists = [
        [x[:6].view(2, 3)],
        [x[:6].view(3, 2)],
        [x[:6].view(3, 2).t()],
        [x[:12].view(2, 6)[:, :3]],
        [x[1:7].view(2, 3)],
        [x.to(torch.float16)[:6].view(2, 3)],
        [x.view(torch.int32)[:6].view(2, 3)],
        [x[:6].view(1, 2, 3)],
        [x[:6].view(2, 3), x[:6].view(2, 3)],
        [made],
        [],
    ]
    assert len({identified(tensors)[0] for tensors in lists}) == len(lists)
    same = [[x[:6].view(2, 3)], [x[4:10].view(2, 3)], [torch.ones(2, 3)]]
    found = [identified(tensors) for tensors in same]
    assert len({layout for layout, _ in found}) == 1
    assert len({places for _, places in found}) == 3


def test_calls_that_differ_in_a_number_or_in_which_list_a_tensor_is_in_have_different_keys():
    x = torch.zeros(2, 3)
    whole = [[x], [x], x[0], x[0], [0, 1], [1], [-1], [1.5], [6]]
    changes = {0: [x, x], 1: [], 2: x[0, :2], 3: x[0].half(), 4: [0], 5: [2], 6: [0], 7: [1.25], 8: [5]}
    calls = [whole, *([*whole[:i], other, *whole[i + 1 :]] for i, other in changes.items())]
    calls.append([[x], [x], x[0], x[0], [0], [1, 1], [-1], [1.5], [6]])
    assert len({tensor_lists.identify("rescale", each)[0] for each in calls}) == len(calls)
    backward = [[x], None, [x], [], x[0], x[0], [0], [1], [-1], [1.5], [6]]
    both = [backward, [[x], x[0], *backward[2:]]]
    assert len({tensor_lists.identify("rescale_backward", each)[0] for each in both}) == 2


def test_a_tensor_without_strides_has_no_key():
    with pytest.raises(RuntimeError):
        identified([torch.eye(3).to_sparse()])


def test_keys_of_lists_are_never_given_to_others():
    first = [torch.randn(2, 3), torch.randn(4)]
    layout, places = identified(first)
    assert identified(list(first)) == (layout, places)
    others = [torch.randn(n) for n in range(1, 700)]
    found = [identified([x] * (1600 if isinstance(layout, int) else 1)) for x in others]  # more than C++ remembers
    assert len({key for key, _ in found} | {layout}) == len({key for _, key in found} | {places}) == 700
    again = identified(first)
    assert again[0] == layout or again[0] not in {key for key, _ in found}
    assert again[1] == places or again[1] not in {key for _, key in found}


def test_single_layers_are_known_again_though_they_are_many():
    layers = [[torch.zeros(2, 3)] for _ in range(1500)]
    first = [identified(tensors) for tensors in layers]
    assert [identified(tensors) for tensors in layers] == first
    alike = memory.Tables([memory.Address(0), *range(18)])
    at = memory.now(torch.device("cpu"))
    for tensors in layers[:200]:
        alike.get(tensors[0].data_ptr(), [tensors], at)
    assert all(alike.known(tensors[0].data_ptr(), None, at) is not None for tensors in layers[:200])


def test_threads_that_ask_at_once_get_keys_and_tables_of_their_own_lists(monkeypatch):
    monkeypatch.setattr(memory, "_TABLES", 8)
    monkeypatch.setattr(memory, "_NUMBERS", 8)
    tables = memory.Tables([memory.Address(0), 7, memory.Address(1)])
    lists = [[torch.randn(3), torch.randn(4 + i % 5)] for i in range(40)]
    at = memory.now(torch.device("cpu"))
    wrong: list[object] = []
    start = threading.Barrier(4)

    for tensors in 2 * lists:  # what is remembered of calls is not full while they ask
        identified(tensors)

    def ask() -> None:
        start.wait()
        for _ in range(50):
            for tensors in lists:
                layout, places = identified(tensors)
                again, _ = identified([torch.empty_like(x) for x in tensors])
                table = tables.get(places, [tensors], at).tolist()
                if table != [tensors[0].data_ptr(), 7, tensors[1].data_ptr()] or layout != again:
                    wrong.append(table)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(tables._known) <= 8


def captured() -> memory.Now:
    """Of a call whose launches go into a graph."""
    return memory.Now(torch.device("cpu"), 0, True)


@pytest.fixture
def reserves(monkeypatch) -> dict[torch.device, memory.Reserve]:
    """None there is at first, and they are smaller than usual."""
    monkeypatch.setattr(memory, "_RESERVE", 256)
    monkeypatch.setattr(memory, "_reserves", {})
    return memory._reserves


def test_tables_of_a_captured_call_are_on_the_device_when_it_is_recorded(reserves):
    at, tensors = captured(), [torch.zeros(3), torch.zeros(4)]
    tables = memory.Tables([memory.Address(0), 7, memory.Address(1)])
    with pytest.raises(RuntimeError, match="a step must have run once, as it is, before it is captured"):
        tables.get("first", [tensors], at)
    memory.replenish(at.device)
    assert list(reserves) == [at.device]
    found = tables.get("first", [tensors], at)
    assert found.tolist() == [tensors[0].data_ptr(), 7, tensors[1].data_ptr()]
    assert tables.get("first", [tensors], at).data_ptr() == found.data_ptr()
    other = tables.get("second", [tensors[::-1]], at)
    assert other.tolist() == [tensors[1].data_ptr(), 7, tensors[0].data_ptr()]
    assert found.tolist() == [tensors[0].data_ptr(), 7, tensors[1].data_ptr()]
    assert all(x.data_ptr() % 16 == 0 for x in (found, other))


def test_captured_calls_have_counters_of_their_own_and_eager_calls_replenish_the_reserve(reserves):
    at = captured()
    memory.replenish(at.device)
    first = reserves[at.device]
    counters = [memory.counters(5, at) for _ in range(5)]
    for i, found in enumerate(counters):
        assert len(found) >= 5
        assert found.dtype == torch.int32
        assert not found.any()
        found += i + 1
    assert [int(found[0]) for found in counters] == [1, 2, 3, 4, 5]
    memory.replenish(at.device)
    second = reserves[at.device]
    assert second is not first
    memory.replenish(at.device)
    assert reserves[at.device] is second


def test_captures_that_need_more_than_there_is_say_so_and_get_twice_as_much_after_an_eager_call(reserves):
    at = captured()
    memory.replenish(at.device)
    with pytest.raises(RuntimeError, match="used up: run a step once more without capturing it"):
        memory.counters(600, at)
    memory.replenish(at.device)
    assert len(memory.counters(600, at)) >= 600
    memory.replenish(at.device)
    assert reserves[at.device].size == 512


@pytest.mark.usefixtures("reserves")
def test_a_reserve_made_in_inference_mode_serves_captures_outside_of_it():
    at, x = captured(), torch.zeros(3)
    with torch.inference_mode():
        memory.replenish(at.device)
    assert memory.Tables([memory.Address(0), 7]).get("places", [[x]], at).tolist() == [x.data_ptr(), 7]


@pytest.mark.usefixtures("reserves")
def test_of_threads_that_find_no_reserve_one_makes_it(monkeypatch):
    """Another one would take the place of that from which a graph reads."""
    made = []

    class Slow(memory.Reserve):
        def __init__(self, *arguments: object) -> None:
            time.sleep(0.05)
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(memory, "Reserve", Slow)
    threads = [threading.Thread(target=memory.replenish, args=(torch.device("cpu"),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_tables_are_sent_by_a_stream_that_is_not_captured(monkeypatch):
    """torch hands out its streams in turn: that of a capture may come."""
    streams, current = itertools.cycle(["captured", "captured too", "free"]), []

    @contextmanager
    def on(stream: str) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: next(streams))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: "captured" in current[-1])
    assert memory.stream_aside(torch.device("cuda", 0)) == "free"
    streams = itertools.repeat("captured")
    with pytest.raises(RuntimeError, match="all of torch's streams of cuda:0 are being captured"):
        memory.stream_aside(torch.device("cuda", 0))


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vectors_are_marked_as_changed_once_they_are_whoever_writes_them(dtype, mode):
    """float64 is served by the reference."""
    c = call([torch.randn(6, 4, 3, dtype=dtype)], [0])
    for before in range(3):
        assert {x._version for x in (*c.u, *c.v)} == {before}
        with mode():
            c.iterate()
            c.iterate(in_place=True)


def test_vectors_made_in_inference_mode_are_updated_there_and_only_there():
    with torch.inference_mode():
        c = call([torch.randn(6, 4, 3)], [0])
        before = c.u[0].clone()
        for _ in range(3):
            c.iterate(in_place=True)
        assert not torch.equal(c.u[0], before)
    with pytest.raises(RuntimeError, match=r"u\[0\] or v\[0\] was made in inference mode"):
        c.iterate(in_place=True)


def test_a_lazy_clone_is_not_taken_for_its_original():
    c = call([torch.randn(6, 4, 3)], [0])
    for _ in range(2):
        c.iterate(in_place=True)
    before, clone = c.u[0].clone(), torch._lazy_clone(c.u[0])
    weights, u, *rest = c.iteration()
    ops.power_iteration_(weights, [clone, *u[1:]], *rest, 1)
    assert torch.equal(c.u[0], before)
    assert not torch.equal(clone, before)
