"""Wrong arguments of the list ops: an error that names the argument and the position, from kernels and reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastsn import ops
from op_calls import Call, call

IMPLEMENTATIONS = {
    "dispatched": (ops.power_iteration, ops.rescale),
    "reference": (ops.fallback.power_iteration, ops.fallback.rescale),
}


def sound() -> Call:
    return call([torch.randn(3, 2, 2, 2), torch.randn(2, 4, 3), torch.randn(5, 3)], [0, 1, 0], [3, 3, 1], "tensor")


def change(field: str, position: int, value: Any) -> Callable[[Call], None]:
    return lambda c: getattr(c, field).__setitem__(position, value)


def drop(field: str) -> Callable[[Call], None]:
    return lambda c: getattr(c, field).pop()


WRONG_ITERATIONS = [
    (lambda c: c.weights.clear(), ValueError, "weights must have at least one entry"),
    (drop("dims"), ValueError, "dims must have 3 entries, one per entry of weights, got 2"),
    (drop("view_masks"), ValueError, "view_masks must have 3 entries, one per entry of weights, got 2"),
    (drop("v_first"), ValueError, "v_first must have 3 entries, one per entry of weights, got 2"),
    (drop("u"), ValueError, "u must have 5 entries, one per weight and view, got 4"),
    (drop("v"), ValueError, "v must have 5 entries, one per weight and view, got 4"),
    (change("weights", 1, torch.ones(2, 4, 3, dtype=torch.int64)), TypeError, r"weights\[1\] must be float32, .* got"),
    (change("weights", 1, torch.randn(2, 4, dtype=torch.complex64)), TypeError, r"weights\[1\] must be float32"),
    (change("weights", 2, torch.randn(5, 3).to_sparse()), TypeError, r"weights\[2\] must be dense, got layout"),
    (change("weights", 1, torch.randn(2, 0, 3)), ValueError, r"weights\[1\] must have at least one element"),
    (change("weights", 2, torch.randn(5)), ValueError, r"weights\[2\] must have at least 2 dimensions, .* \[5\]"),
    (change("weights", 2, torch.randn(())), ValueError, r"weights\[2\] must have at least 2 dimensions, .* \[\]"),
    (change("weights", 1, torch.randn(2, 4, 3).double()), TypeError, r"weights\[1\] must have sums in .* weights\[0\]"),
    (change("dims", 1, 3), IndexError, r"dims\[1\] must be in \[0, 2\], got 3"),
    (change("dims", 1, -1), IndexError, r"dims\[1\] must be in \[0, 2\], got -1"),
    (change("view_masks", 0, 4), ValueError, r"view_masks\[0\] must be 1 \(out\), 2 \(in\) or 3 \(both\), got 4"),
    (change("v_first", 1, 2), ValueError, r"v_first\[1\] must be 0 \(u first\) or 1 \(v first\), got 2"),
    (change("v_first", 2, -1), ValueError, r"v_first\[2\] must be 0 \(u first\) or 1 \(v first\), got -1"),
    (change("u", 2, torch.randn(5)), ValueError, r"u\[2\] must have shape \[4\], got \[5\]"),
    (change("v", 3, torch.randn(2, 1)), ValueError, r"v\[3\] must have shape \[2\], got \[2, 1\]"),
    (change("v", 4, torch.randn(3).double()), TypeError, r"v\[4\] must be .*[fF]loat.*, got"),
]

WRONG_RESCALES = [
    (drop("scale_index"), ValueError, "scale_index must have 3 entries, one per weight, got 2"),
    (drop("scale_factor"), ValueError, "scale_factor must have 3 entries, one per weight, got 2"),
    (drop("dtypes"), ValueError, "dtypes must have 3 entries, one per weight, got 2"),
    (change("scales", 0, torch.ones(2)), ValueError, r"scales\[0\] must be one number, got shape \[2\]"),
    (change("scales", 0, torch.ones(1).long()), TypeError, r"scales\[0\] must be floating point, got"),
    (change("scale_index", 2, 1), IndexError, r"scale_index\[2\] must be less than 1, the number of scales, got 1"),
    (change("scale_factor", 1, float("nan")), ValueError, r"scale_factor\[1\] must be finite, got nan"),
    (change("scale_factor", 0, float("inf")), ValueError, r"scale_factor\[0\] must be finite, got inf"),
    (change("dtypes", 1, 3), TypeError, r"dtypes\[1\] must be .*5.*6.*7.*15.*, got 3"),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("spoil", "error", "message"), WRONG_ITERATIONS)
def test_wrong_lists_of_an_iteration(implementation, spoil, error, message):
    c = sound()
    spoil(c)
    before = [x.clone() for x in c.u + c.v]
    with pytest.raises(error, match=message):
        IMPLEMENTATIONS[implementation][0](*c.iteration(), 1)
    assert all(map(torch.equal, before, c.u + c.v))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_too_few_iterations(implementation):
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        IMPLEMENTATIONS[implementation][0](*sound().iteration(), -1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("spoil", "error", "message"), WRONG_RESCALES)
def test_wrong_numbers_of_a_rescale(implementation, spoil, error, message):
    c = sound()
    state = c.iterate()
    spoil(c)
    with pytest.raises(error, match=message):
        IMPLEMENTATIONS[implementation][1](c.weights, c.scales, *state, *c.numbers())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("position", "name"), [(0, "sigma"), (1, "vectors")])
def test_a_state_that_belongs_to_other_weights(implementation, position, name):
    c = sound()
    state = list(c.iterate())
    state[position] = state[position][:-1]
    with pytest.raises(ValueError, match=rf"{name} must have shape \[\d+\], got \[\d+\]"):
        IMPLEMENTATIONS[implementation][1](c.weights, c.scales, *state, *c.numbers())


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda a: a[0].pop(), ValueError, "gradients must have 1 entries, one per entry of bases, got 0"),
        (lambda a: a[0].__setitem__(0, torch.randn(3, 2)), ValueError, r"gradients\[0\] must have shape \[3, 2, 2\]"),
        (lambda a: a[0].__setitem__(0, torch.ones(3, 2, 2).long()), TypeError, r"gradients\[0\] must be float32"),
        (
            lambda a: a[0].__setitem__(0, torch.ones(3, 2, 2).to(torch.float8_e5m2)),
            TypeError,
            r"gradients\[0\] must be",
        ),
        (lambda a: a[-1].__setitem__(0, 262), TypeError, r"dtypes\[0\] must be .*, got 262"),
        (lambda a: a.__setitem__(1, torch.zeros(2)), ValueError, r"grad_sigma must have shape \[1\], got \[2\]"),
    ],
)
@pytest.mark.parametrize("implementation", [ops.rescale_backward, ops.fallback.rescale_backward])
def test_wrong_gradients(implementation, spoil, error, message):
    c = call([torch.randn(3, 2, 2)], [0])
    sigma, vectors = c.iterate()
    with torch.no_grad():
        outputs, mean = c.rescale(sigma, vectors)
        arguments = [[torch.ones_like(outputs[0])], torch.zeros(1), outputs, [], mean, vectors, *c.numbers()]
        spoil(arguments)
        with pytest.raises(error, match=message):
            implementation(*arguments)


def test_weights_of_several_devices():
    c = sound()
    c.weights[1] = c.weights[1].to("meta")
    message = rf"weights\[1\] must be on the device of weights\[0\], {c.weights[0].device}, got meta"
    with pytest.raises(ValueError, match=message):
        ops.fallback.power_iteration(*c.iteration(), 1)


def test_vectors_made_in_inference_mode_are_not_updated_outside_of_it():
    with torch.inference_mode():
        c = call([torch.randn(3, 2, 2)], [0])
    c.weights = [torch.randn(3, 2, 2)]
    with pytest.raises(RuntimeError, match="inference"):
        c.iterate(in_place=True)
    with torch.inference_mode():
        c.iterate(in_place=True)


def test_a_scale_on_the_meta_device_is_not_read():
    c = call([torch.randn(4, 3)], [0], 1, "tensor")
    sigma, vectors = c.iterate()
    c.scales = [c.scales[0].to("meta")]
    with pytest.raises(ValueError, match=r"scales\[0\] must be on the device of weights\[0\], \S+, got meta"):
        c.rescale(sigma, vectors)
