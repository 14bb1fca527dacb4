"""Named rows of the papers' tables, as flags of the recipes.

bsn-1, bsn-2, bsn-3: the groups of Lin et al., NeurIPS 2021, and their code (fjxmlzn/BSN): scales, learning rates,
SN-GAN's setting A; with -same and -different the trainable factors under Wasserstein with a gradient penalty.
sngan-a to sngan-f: the settings of Miyato et al., ICLR 2018, Table 1, with the order of steps and the images of their
code (pfnet-research/sngan_projection). sngan-resnet: the best row of its Table 2.
Of ImageNet, 128 pixels a side: bsn is that of Lin et al., sngan-concat that of Miyato et al. (4.2), sngan-projection
that of Miyato and Koyama, ICLR 2018.

``METHODS``: what the papers compare, for any preset: normalization, loss, gradient penalty.
Miyato et al., Table 2: no-norm, weight-clipping, gan-gp, wgan-gp, batch-norm, layer-norm, weight-norm, orthonormal and
sn with the standard loss where the name says no other, orthonormal-hinge, sn-hinge. Tables 7 and 8:
wgan-gp-weight-norm, here without a trainable factor, and wgan-gp-sn, whose factors begin at 1 and multiply biases, too
(the authors' begin at the norm of the first weight).
Lin et al., with the hinge loss: ssn, bsn, bssn, sn-conv, the first, third and fourth with --scale; under Wasserstein
with a gradient penalty sn-same-gamma and sn-different-gamma.
"""

from __future__ import annotations

from typing import Any

BSN: dict[str, Any] = {
    "architecture": "bsn",
    "loss": "hinge",
    "u_schedule": "per_d_step",
    "order": "d_first",
    "z_of_g": "reused",
    "batch_size": 64,
    "protocol": "bsn",
}
_GROUPS: dict[str, dict[str, Any]] = {
    "bsn-1": {"lr_g": 1e-4, "lr_d": 1e-4, "beta1": 0.5, "beta2": 0.999, "n_dis": 1},
    "bsn-2": {"lr_g": 2e-4, "lr_d": 2e-4, "beta1": 0.5, "beta2": 0.999, "n_dis": 1},
    "bsn-3": {"lr_g": 1e-4, "lr_d": 1e-4, "beta1": 0.5, "beta2": 0.9, "n_dis": 5},
}
_SNGAN: dict[str, Any] = {
    "architecture": "sngan",
    "loss": "standard",
    "u_schedule": "per_forward",
    "order": "g_first",
    "z_of_g": "fresh",
    "batch_size": 64,
    "steps": 100_000,
    "picks": "by_epochs",
    "dequantize": True,
    "protocol": "sngan",
}
_RESNET: dict[str, Any] = {"loss": "hinge", "lr_g": 2e-4, "lr_d": 2e-4, "beta1": 0.0, "beta2": 0.9, "n_dis": 5}
_SNGAN_RESNET: dict[str, Any] = {**_SNGAN, **_RESNET, "architecture": "sngan-resnet", "batch_size_g": 128}
_SETTINGS = {
    "a": (1e-4, 0.5, 0.9, 5),
    "b": (1e-4, 0.5, 0.999, 1),
    "c": (2e-4, 0.5, 0.999, 1),
    "d": (1e-3, 0.5, 0.9, 5),
    "e": (1e-3, 0.5, 0.999, 5),
    "f": (1e-3, 0.9, 0.999, 5),
}

PRESETS: dict[str, dict[str, Any]] = {name: {**BSN, **group} for name, group in _GROUPS.items()}
PRESETS |= {
    f"{name}-{gamma}": {**BSN, **_GROUPS[name], "gamma": gamma, "loss": "wasserstein", "gradient_penalty": 10.0}
    for name in ("bsn-2", "bsn-3")
    for gamma in ("same", "different")
}
PRESETS |= {
    f"sngan-{name}": {**_SNGAN, "lr_g": lr, "lr_d": lr, "beta1": beta1, "beta2": beta2, "n_dis": n_dis}
    for name, (lr, beta1, beta2, n_dis) in _SETTINGS.items()
}
# 100,000 steps are the paper's; that the learning rate falls from the first step on is from the code's configs, which
# have 50,000.
PRESETS["sngan-resnet"] = {**_SNGAN_RESNET, "decay_from": 0}

# Four GPUs had 16 images of a discriminator step and 32 of a generator step each, and batch norm of their own.
_IMAGENET: dict[str, Any] = {**_SNGAN_RESNET, "bn_groups": 4, "steps": 450_000, "decay_from": 400_000}
IMAGENET: dict[str, dict[str, Any]] = {
    "bsn": {
        **BSN,
        **_RESNET,
        "architecture": "bsn-resnet",
        "batch_size": 16,
        "batch_size_g": 32,
        "z_of_g": "fresh",
        "batch_norm_in_d_steps": False,
        "picks": "with_replacement",
        "steps": 500_000,
    },
    "sngan-projection": {**_IMAGENET, "conditional": "projection"},
    "sngan-concat": {**_IMAGENET, "conditional": "concat"},
}


def _method(norm: str, loss: str, penalty: float = 0.0, gamma: str = "none") -> dict[str, Any]:
    return {"norm": norm, "loss": loss, "gradient_penalty": penalty, "gamma": gamma}


METHODS: dict[str, dict[str, Any]] = {
    "no-norm": _method("none", "standard"),
    "weight-clipping": _method("clip", "standard"),
    "gan-gp": _method("none", "standard", 10.0),
    "wgan-gp": _method("none", "wasserstein", 10.0),
    "batch-norm": _method("bn", "standard"),
    "layer-norm": _method("ln", "standard"),
    "weight-norm": _method("wn", "standard"),
    "orthonormal": _method("orthonormal", "standard"),
    "orthonormal-hinge": _method("orthonormal", "hinge"),
    "sn": _method("sn", "standard"),
    "sn-hinge": _method("sn", "hinge"),
    "wgan-gp-weight-norm": _method("wn", "wasserstein", 10.0),
    "wgan-gp-sn": _method("sn", "wasserstein", 10.0, "different"),
    "ssn": _method("ssn", "hinge"),
    "bsn": _method("bsn", "hinge"),
    "bssn": _method("bssn", "hinge"),
    "sn-conv": _method("sn_conv", "hinge"),
    "sn-same-gamma": _method("sn", "wasserstein", 10.0, "same"),
    "sn-different-gamma": _method("sn", "wasserstein", 10.0, "different"),
}
