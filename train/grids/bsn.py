"""The runs of Lin, Sekar, Fanti, "Why Spectral Normalization Stabilizes GANs", NeurIPS 2021, as the four configurations
of its authors' code (fjxmlzn/BSN) have them: what they call SN or BSN with a scale is ssn or bssn here.

bsn-cnn: 480 runs, of which 30 are in two groups. Each kind of trainable factor: 75. bsn-resnet, on ImageNet: 24.
"""

from __future__ import annotations

from gan.presets import IMAGENET, PRESETS
from gan.sweep.grid import Entry, Fields, Grid, product, scaled, seeds, values

_CIFAR10_SCALES = (0.7, 0.8, 0.9, *(round(1 + 0.2 * i, 1) for i in range(16)))
_SCALES = (0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6)
_STEPS = {"cifar10": 400_000, "stl10": 800_000, "celeba": 400_000}
_RATES: list[Fields] = [{"lr_g": g, "lr_d": d} for g in (1e-4, 2e-4) for d in (1e-4, 2e-4)]
_NAMES = ("recipe", "norm", "scale", "lr_g", "lr_d", "beta2", "n_dis", "steps", "seed")


def _both(*scales: float) -> list[Fields]:
    return [*scaled("ssn", *scales), *scaled("bssn", *scales)]


def _rates_and_setting_a(methods: list[Fields], suffix: str = "") -> list[Entry]:
    """Groups 2 and 3: four pairs of learning rates, and SN-GAN's setting A."""
    rates = [
        x
        for recipe, steps in _STEPS.items()
        for x in product(recipe, [PRESETS[f"bsn-2{suffix}"]], _RATES, methods, values("steps", steps), seeds(5))
    ]
    setting_a = [
        x
        for recipe in _STEPS
        for x in product(recipe, [PRESETS[f"bsn-3{suffix}"]], methods, values("steps", 400_000), seeds(5))
    ]
    return rates + setting_a


_SCALE_SWEEP = [
    x
    for recipe, steps in _STEPS.items()
    for x in product(
        recipe,
        [PRESETS["bsn-1"]],
        _both(*(_CIFAR10_SCALES if recipe == "cifar10" else _SCALES)),
        values("steps", steps),
        seeds(5),
    )
]
_SN: list[Fields] = [{"norm": "sn"}]

GRIDS = {
    "bsn-cnn": Grid(
        "Scores against scale; learning rates; setting A (no_gamma-CNN)",
        _NAMES,
        _SCALE_SWEEP + _rates_and_setting_a(_both(1.0)),
    ),
    "bsn-cnn-same-gamma": Grid(
        "One trainable factor for all layers (same_gamma-CNN)", _NAMES, _rates_and_setting_a(_SN, "-same")
    ),
    "bsn-cnn-different-gamma": Grid(
        "A trainable factor for each layer (diff_gamma-CNN)", _NAMES, _rates_and_setting_a(_SN, "-different")
    ),
    "bsn-resnet": Grid(
        "ImageNet (no_gamma-ResNet)",
        ("norm", "scale", "seed"),
        product("imagenet", [IMAGENET["bsn"]], _both(1.0, 1.2, 1.4, 1.6), seeds(3)),
    ),
}
