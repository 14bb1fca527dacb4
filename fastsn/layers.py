"""{SN, SSN, BSN, BSSN} x {Linear, Conv1-3d, ConvTranspose1-3d, Embedding}: torch's layers with a normalized weight.

Each class is a subclass of the torch layer with the same arguments plus ``scale``, ``n_power_iterations``, ``eps`` and
``scale_bias``. The parameter stays ``weight`` (not normalized: what ``nn.init`` and optimizers expect); the child
``spectral_norm`` holds u and v.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastsn import checks, loading, variants, views
from fastsn.norm import SpectralNorm

_DOC = r"""``{plain}`` with :math:`\bar W = {equation}` in place of W.

    Takes the arguments of ``{plain}`` and
        scale: the constant c, a float, a tensor of one element or a (learnable, shareable) Parameter{fixed}.
        n_power_iterations: power iterations per forward in training mode.
        impl: "auto", "reference", "cpp" or "triton", see ``fastsn.backends``.
        eps: accepted for compatibility with torch; without effect, as u and v are normalized exactly at any size.
        scale_bias: multiply the bias by c too (the gamma variants of the paper){needs_free}.

    Shapes: those of ``{plain}``. Any floating or complex dtype; u and v are float32 or wider. With groups the norm is
    that of the weight tensor as torch stores it, which bounds the norm of every group.

    Raises ValueError or TypeError for a scale that is not finite and positive{or_one}, n_power_iterations < 1, a
    negative eps, and what ``{plain}`` raises. Source: {source}.
    """


def _equation(row: variants.Variant) -> str:
    """W̄ in LaTeX."""
    sigmas = [rf"\sigma_{{{view}}}" for view in row.views]
    divisor = sigmas[0] if len(sigmas) == 1 else f"(({' + '.join(sigmas)})/{len(sigmas)})"
    return ("c \\, " if row.free_scale else "") + "W / " + divisor


class NormalizedLayer(nn.Module):
    """Base class of all layers: adds a SpectralNorm for ``weight`` to a torch layer."""

    variant: ClassVar[str]
    plain: ClassVar[type[nn.Module]]
    follows_autocast: ClassVar[bool] = True
    weight: Tensor

    def __init__(
        self,
        *args: Any,
        scale: float | Tensor = 1.0,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        scale_bias: bool = False,
        impl: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        has_bias = getattr(self, "bias", None) is not None
        if checks.flag(scale_bias, "scale_bias") and not (variants.get(self.variant).free_scale and has_bias):
            raise ValueError(f"scale_bias must be False, got True: {type(self).__name__} has no free scale or no bias")
        self.scale_bias = scale_bias
        self.spectral_norm = SpectralNorm(
            self.weight,
            n_power_iterations,
            views.output_dim(self),
            eps,
            variant=self.variant,
            scale=scale,
            impl=impl,
            follows_autocast=self.follows_autocast,
        )
        self.register_load_state_dict_post_hook(load_post_hook)  # type: ignore[no-untyped-call]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "variant" not in cls.__dict__:  # a user's subclass: its own __init__ has its own signature
            if "__init__" in cls.__dict__:
                own = list(inspect.signature(cls.__init__).parameters.values())[1:]
                cls.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
            return
        row = variants.VARIANTS[cls.variant]
        cls.plain = next(base for base in cls.__mro__ if base.__module__.startswith("torch.nn.modules."))
        cls.__doc__ = _DOC.format(
            plain=f"nn.{cls.plain.__name__}",
            equation=_equation(row),
            fixed="" if row.free_scale else "; it is 1 for this variant",
            needs_free="" if row.free_scale else "; must be False for this variant",
            or_one="" if row.free_scale else " or not 1",
            source=row.source,
        )
        # So that help() and editors show the arguments of torch and of fastsn, not *args and **kwargs.
        own = [p for p in inspect.signature(NormalizedLayer.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
        torchs = list(inspect.signature(cls.plain.__init__).parameters.values())[1:]
        cls.__signature__ = inspect.Signature(torchs + own)  # type: ignore[attr-defined]

    def normalized(self) -> tuple[Tensor, Tensor | None]:
        """The normalized weight and the bias of a forward. In training mode this runs the power iteration."""
        stored = self._parameters  # nn.Module.__getattr__ takes as long as everything else in reading a cached W̄
        weight: Tensor | None = stored.get("weight")
        if weight is None:  # a parametrization or hook computes it
            weight = self.weight
        bias = stored["bias"] if "bias" in stored else getattr(self, "bias", None)
        norm: Any = self._modules["spectral_norm"]
        if self.scale_bias and bias is not None:
            bias = norm.scaled(bias)
        return norm.fast_call(weight), bias

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if f"{prefix}spectral_norm._u" not in state_dict:
            self._advice = prefix, loading.advice(state_dict, prefix)

    def reset_parameters(self) -> None:
        """torch's initialization; then u and v are warmed up for the new weight."""
        super().reset_parameters()  # type: ignore[misc]
        if "spectral_norm" in self._modules and not self.weight.is_meta:
            self.spectral_norm.warm_up(self.weight)

    def extra_repr(self) -> str:
        """The torch layer's, the variant and the scale."""
        return f"{super().extra_repr()}, {self.spectral_norm.extra_repr()}" + ", scale_bias=True" * self.scale_bias


def load_post_hook(layer: Any, keys: Any) -> None:
    """Post hook of load_state_dict: warm up the vectors that the checkpoint lacks."""
    layer.spectral_norm.warm_up_missing(lambda: layer.weight, keys.missing_keys)
    prefix, advice = layer.__dict__.pop("_advice", ("", None))
    if advice is not None:
        loading.advise(keys.missing_keys, prefix, advice)


# The classes below are mixins of torch layers and read their attributes: hence self: Any.


class _Linear(NormalizedLayer):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, *self.normalized())


class _Conv(NormalizedLayer):
    def forward(self: Any, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(input, *self.normalized())
        return output


class _ConvTranspose(NormalizedLayer):
    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        weight, bias = self.normalized()
        positions = weight.ndim - 2
        convolve: Callable[..., Tensor] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[positions - 1]
        extra = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, positions, self.dilation
        )
        output: Tensor = convolve(input, weight, bias, self.stride, self.padding, extra, self.groups, self.dilation)
        return output


class _Embedding(NormalizedLayer):
    follows_autocast = False  # autocast leaves a lookup in the weight's own dtype

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.max_norm is not None:
            raise ValueError(f"max_norm must be None, got {self.max_norm}: it would overwrite the normalized rows")
        if self.sparse:
            raise ValueError("sparse must be False, got True: the gradient of a norm touches every row")

    def forward(self: Any, input: Tensor) -> Tensor:
        weight, _ = self.normalized()
        return F.embedding(input, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


class SNLinear(_Linear, nn.Linear):
    variant = "sn"


class SNConv1d(_Conv, nn.Conv1d):
    variant = "sn"


class SNConv2d(_Conv, nn.Conv2d):
    variant = "sn"


class SNConv3d(_Conv, nn.Conv3d):
    variant = "sn"


class SNConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    variant = "sn"


class SNConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    variant = "sn"


class SNConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    variant = "sn"


class SNEmbedding(_Embedding, nn.Embedding):
    variant = "sn"


class SSNLinear(_Linear, nn.Linear):
    variant = "ssn"


class SSNConv1d(_Conv, nn.Conv1d):
    variant = "ssn"


class SSNConv2d(_Conv, nn.Conv2d):
    variant = "ssn"


class SSNConv3d(_Conv, nn.Conv3d):
    variant = "ssn"


class SSNConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    variant = "ssn"


class SSNConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    variant = "ssn"


class SSNConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    variant = "ssn"


class SSNEmbedding(_Embedding, nn.Embedding):
    variant = "ssn"


class BSNLinear(_Linear, nn.Linear):
    variant = "bsn"


class BSNConv1d(_Conv, nn.Conv1d):
    variant = "bsn"


class BSNConv2d(_Conv, nn.Conv2d):
    variant = "bsn"


class BSNConv3d(_Conv, nn.Conv3d):
    variant = "bsn"


class BSNConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    variant = "bsn"


class BSNConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    variant = "bsn"


class BSNConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    variant = "bsn"


class BSNEmbedding(_Embedding, nn.Embedding):
    variant = "bsn"


class BSSNLinear(_Linear, nn.Linear):
    variant = "bssn"


class BSSNConv1d(_Conv, nn.Conv1d):
    variant = "bssn"


class BSSNConv2d(_Conv, nn.Conv2d):
    variant = "bssn"


class BSSNConv3d(_Conv, nn.Conv3d):
    variant = "bssn"


class BSSNConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    variant = "bssn"


class BSSNConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    variant = "bssn"


class BSSNConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    variant = "bssn"


class BSSNEmbedding(_Embedding, nn.Embedding):
    variant = "bssn"
