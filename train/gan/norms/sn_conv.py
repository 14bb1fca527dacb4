"""Spectral normalization by the norm of a convolution as a linear operator, at the size of its real inputs.

A convolution without its bias is a matrix A from images (I, H, W) to images (O, H', W') that depends on stride, zero
padding and size. Its spectral norm is found by power iteration, with the convolution and its adjoint in the place of
the matrix (Farnia et al., ICLR 2019; Gouk et al., Machine Learning 2021):

    u <- A v / ‖A v‖,  v <- Aᵀ u / ‖Aᵀ u‖,  sigma = <u, A v>,  W̄ = scale · W / sigma

with u, v held constant in the gradient, as in Miyato et al., ICLR 2018. Lin et al., NeurIPS 2021, compare SN, which
divides by the norm of the reshaped weight, with this "SN_Conv".
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

import fastsn
from gan.devices import tf32

WARM_UP_ITERATIONS = 15  # as fastsn.warm_up


class _Held(NamedTuple):
    """What serves all forwards of a step."""

    u: Tensor
    v: Tensor
    weight: Tensor
    version: int


class OperatorConv2d(nn.Conv2d):
    """nn.Conv2d with W̄ = scale · W / sigma, sigma the norm of the convolution as an operator.

    Buffers ``_u`` (1, O, H', W') and ``_v`` (1, I, H, W), unit vectors, are there after ``see``. In training, a forward
    outside of ``held`` iterates once and stores. A weight of zeros stays zero. Float32 or wider, whatever autocast and
    TF32 say for other products, and alike on all GPUs of one kind.

    Raises ValueError for a scale that is not finite and positive, padding other than by numbers of zeros, a forward
    before ``see`` or on inputs of another size.
    """

    def __init__(self, *args: Any, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be finite and positive, got {scale!r}")
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            raise ValueError(f"padding must be numbers of zeros, got {self.padding!r} of {self.padding_mode!r}")
        self.scale = scale
        self.register_buffer("_u", None)
        self.register_buffer("_v", None)
        self._held: _Held | None = None

    def extra_repr(self) -> str:
        """The torch layer's, and the scale."""
        return f"{super().extra_repr()}, scale={self.scale:g}"

    @torch.no_grad()
    def see(self, size: Sequence[int]) -> None:
        """Draw u and v for inputs of this size (I, H, W), and bring them to the weight."""
        wide = self._wide().detach()
        v = torch.randn(1, *size, dtype=wide.dtype, device=wide.device)
        u = torch.randn_like(self._operator(wide, v))
        self._u, self._v = u / u.norm(), v / v.norm()
        for _ in range(WARM_UP_ITERATIONS):
            self.advance()

    def forward(self, input: Tensor) -> Tensor:
        if self._v is None or input.shape[1:] != self._v.shape[1:]:
            seen = "none yet" if self._v is None else tuple(self._v.shape[1:])
            raise ValueError(f"input must have the size that see() was given, {seen}, got {tuple(input.shape[1:])}")
        return self._conv_forward(input, *self.normalized())

    def normalized(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a forward. In training, outside of ``held``, u and v advance."""
        if self._held is None:
            return self._fresh(), self.bias
        if not torch.compiler.is_compiling() and self._is_stale(self._held):
            self._held = self._made(self._held.u, self._held.v)
        return self._held.weight, self.bias

    @torch.compiler.disable
    def _fresh(self) -> Tensor:
        u, v = self.iterated() if self.training else (self._u.clone(), self._v.clone())
        if self.training:
            self._store(u, v)
        return self._made(u, v).weight

    def _is_stale(self, held: _Held) -> bool:
        gradient = torch.is_grad_enabled() and self.weight.requires_grad and not held.weight.requires_grad
        return gradient or held.version != self.weight._version

    @contextlib.contextmanager
    def held(self, advance: bool) -> Iterator[None]:
        """In the block all forwards have one W̄, in training by u and v after one iteration, stored if ``advance``."""
        before = self._held
        u, v = self.iterated() if self.training else (self._u.clone(), self._v.clone())
        if advance and self.training:
            self._store(u, v)
        self._held = self._made(u, v)
        try:
            yield
        finally:
            self._held = before

    def advance(self) -> None:
        """Iterate and store, in any mode."""
        self._store(*self.iterated())

    @torch.no_grad()
    def iterated(self) -> tuple[Tensor, Tensor]:
        """u and v after one iteration, as new tensors."""
        weight = self._wide()
        with _exactly(weight):
            u = _unit(self._operator(weight, self._v), self._u)
            adjoint = conv2d_input(self._v.shape, weight, u, self.stride, self.padding, self.dilation, self.groups)
            return u, _unit(adjoint, self._v)

    def sigma(self, u: Tensor, v: Tensor) -> Tensor:
        """<u, A v>, differentiable in the weight."""
        return self._sigma(self._wide(), u, v)

    def _sigma(self, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        with _exactly(weight):
            return (u * self._operator(weight, v)).sum()

    def _divided(self, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        sigma = self._sigma(weight, u, v)
        return self.scale * weight / torch.where(sigma == 0, torch.ones_like(sigma), sigma)

    def _made(self, u: Tensor, v: Tensor) -> _Held:
        return _Held(u, v, self._divided(self._wide(), u, v).to(self.weight.dtype), self.weight._version)

    @torch.no_grad()
    def _store(self, u: Tensor, v: Tensor) -> None:
        self._u.copy_(u)
        self._v.copy_(v)

    def _operator(self, weight: Tensor, v: Tensor) -> Tensor:
        return F.conv2d(v, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def _wide(self) -> Tensor:
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))


@contextlib.contextmanager
def _exactly(x: Tensor) -> Iterator[None]:
    """No autocast, no TF32, and on a GPU the same bits every time: each rank computes u and v for itself."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        with tf32(x.device, False), torch.autocast(x.device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.deterministic = before


def _unit(x: Tensor, old: Tensor) -> Tensor:
    """x / ‖x‖, or ``old`` where x is zero or not finite. Divided by its largest entry first, so that no square
    underflows or overflows."""
    peak = x.abs().amax()
    sound = peak.isfinite() & (peak > 0)
    scaled = x / torch.where(sound, peak, torch.ones_like(peak))
    return torch.where(sound, scaled / scaled.norm(), old.to(x.dtype))


def _convolutions(model: nn.Module) -> dict[str, OperatorConv2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, OperatorConv2d)}


@torch.no_grad()
def start(model: nn.Module, image: tuple[int, int, int]) -> None:
    """Give every convolution u and v for the size that it meets when the model, a discriminator, sees such an image:
    one forward of zeros, with label 0."""

    def see(layer: OperatorConv2d, given: tuple[Tensor]) -> None:
        layer.see(given[0].shape[1:])

    hooks = [layer.register_forward_pre_hook(see) for layer in _convolutions(model).values()]
    training = model.training
    parameter = next(model.parameters())
    zeros = torch.zeros(1, *image, dtype=parameter.dtype, device=parameter.device)
    model.eval()(zeros, torch.zeros(1, dtype=torch.int64, device=parameter.device))
    model.train(training)
    for hook in hooks:
        hook.remove()


@contextlib.contextmanager
def step(model: nn.Module, advance: bool = True) -> Iterator[None]:
    """``fastsn.step`` for a model that has convolutions of this module as well as layers of fastsn."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(fastsn.step(model, advance))
        for layer in _convolutions(model).values():
            stack.enter_context(layer.held(advance))
        yield


def advance(model: nn.Module) -> None:
    """``fastsn.advance`` for a model that has convolutions of this module as well as layers of fastsn."""
    fastsn.advance(model)
    for layer in _convolutions(model).values():
        layer.advance()


@torch.no_grad()
def sigmas(model: nn.Module) -> dict[str, dict[str, float]]:
    """{layer: {"sigma": <u, A v>}} of the convolutions of this module, by the stored vectors."""
    found = {name: layer.sigma(layer._u, layer._v) for name, layer in _convolutions(model).items()}
    values = torch.stack(list(found.values())).tolist() if found else []
    return {name: {"sigma": x} for name, x in zip(found, values, strict=True)}
