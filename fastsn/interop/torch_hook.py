"""torch's old spectral norm, ``torch.nn.utils.spectral_norm``: a hook before each forward, and its checkpoints."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook

from fastsn.interop.adapters import Adapter, register
from fastsn.norm import SpectralNorm
from fastsn.parametrize import chain_of, follows_autocast

_OF_STATE_DICTS = (SpectralNormStateDictHook, SpectralNormLoadStateDictPreHook)


class Hook(Adapter):
    """A tensor that the hook computes from the parameter ``{tensor}_orig`` and the buffers ``{tensor}_u``, ``_v``."""

    def __init__(self, path: str, owner: nn.Module, key: int, hook: TorchHook) -> None:
        super().__init__("torch's old hook", path, owner, hook.name)
        self._key, self._hook = key, hook

    def obstacle(self) -> str | None:
        owner, tensor = self.owner, self.tensor
        weight, base = owner._parameters.get(f"{tensor}_orig"), tensor.removesuffix("_orig")
        if type(self._hook) is not TorchHook:
            return f"{type(self._hook).__name__} is a subclass of torch's SpectralNorm"
        if weight is None or any(owner._buffers.get(tensor + suffix) is None for suffix in ("_u", "_v")):
            return f"{tensor}_orig, _u and _v are not the hook's own: something else has changed them"
        if base != tensor and any(h is not self._hook and h.name == base for h in hooks_of(owner).values()):
            return f"another hook makes {base} of it"
        if tensor in owner._parameters or tensor in owner._buffers or hasattr(type(owner), tensor):
            return f"{tensor} is not the hook's own: something else has set it"
        if weight.is_complex():
            return "the weight is complex, for which torch's old hook computes something else"
        return None

    def weight(self) -> Tensor:
        weight: Tensor = getattr(self.owner, f"{self.tensor}_orig")
        return weight

    def settings(self) -> dict[str, Any]:
        return {
            "n_power_iterations": self._hook.n_power_iterations,
            "dim": self._hook.dim,
            "eps": self._hook.eps,
            "vectors": {"out": tuple(self.owner._buffers[self.tensor + suffix] for suffix in ("_u", "_v"))},
            "follows_autocast": follows_autocast(self.owner, self.tensor),
            "v_first": True,
        }

    def put(self, norm: SpectralNorm) -> None:
        owner, tensor, weight = self.owner, self.tensor, self.weight()
        for suffix in ("_orig", "_u", "_v"):
            delattr(owner, tensor + suffix)
        del owner._forward_pre_hooks[self._key]
        for hooks in (owner._state_dict_hooks, owner._load_state_dict_pre_hooks):
            for key, wrapped in list(hooks.items()):
                hook: Any = getattr(wrapped, "hook", wrapped)  # torch wraps load hooks
                if isinstance(hook, _OF_STATE_DICTS) and hook.fn.name == tensor:
                    del hooks[key]
        setattr(owner, tensor, weight)  # replaces the plain attribute
        register(owner, tensor, norm)
        owner.register_load_state_dict_pre_hook(OldKeys(self._hook))  # type: ignore[no-untyped-call]


def hooks_of(module: nn.Module) -> dict[int, TorchHook]:
    """torch's old spectral norms of a module, by their keys among its hooks."""
    return {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, TorchHook)}


class OldKeys:
    """Pre hook of load_state_dict: renames the keys of the old hook, ``{tensor}_orig``, ``_u``, ``_v``, to those of
    parametrizations. Checkpoints from before torch 1.0 have W / sigma in ``{tensor}`` and no ``_v``: torch's own load
    hook computes v."""

    def __init__(self, hook: TorchHook) -> None:
        self._tensor, self._upgrade = hook.name, SpectralNormLoadStateDictPreHook(hook)

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Rename the keys in ``state_dict`` in place."""
        if not parametrize.is_parametrized(module, self._tensor):  # parametrization removed or folded
            return
        old = prefix + self._tensor
        if all(old + suffix in state_dict for suffix in ("_orig", "", "_u")):
            self._upgrade(state_dict, prefix, *rest)
        chain = chain_of(module, self._tensor)
        expected = {name for name, _ in (*chain.named_parameters(), *chain.named_buffers())}
        for suffix, new in (("_orig", "original"), ("_u", "0._u"), ("_v", "0._v")):
            value = state_dict.pop(old + suffix, None)
            if value is not None and new in expected:  # a 1-D tensor has no u and v any more
                state_dict.setdefault(f"{prefix}parametrizations.{self._tensor}.{new}", value)
