"""The CNN runs of Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018: CIFAR10 and
STL10 for 100,000 steps each.

Of how many seeds its CNN rows are, and which n_dis and widths lie between the ends of its figures, the paper does not
say: three seeds, and the values here, are this repository's choice.
"""

from __future__ import annotations

from gan.presets import METHODS, PRESETS
from gan.sweep.grid import Entry, Fields, Grid, product, seeds, values

TABLE_2 = (
    *("weight-clipping", "gan-gp", "wgan-gp", "batch-norm", "layer-norm", "weight-norm", "orthonormal", "sn"),
    "sn-hinge",
)
_TWICE = ("orthonormal", "sn", "sn-hinge")
_OF_A_METHOD = ("norm", "loss", "gradient_penalty")


def methods(*names: str) -> list[Fields]:
    """Rows of --method."""
    return [METHODS[name] for name in names]


def _of_both(*choices: list[Fields]) -> list[Entry]:
    return [entry for recipe in ("cifar10", "stl10") for entry in product(recipe, *choices)]


_SETTINGS: list[Fields] = [PRESETS[f"sngan-{letter}"] for letter in "abcdef"]
_C, _D = [PRESETS["sngan-c"]], [PRESETS["sngan-d"]]

GRIDS = {
    "sngan-settings": Grid(
        "Scores of every method under the settings A to F (Figures 1 and 2, Table 2)",
        ("recipe", *_OF_A_METHOD, "lr_g", "beta1", "beta2", "n_dis", "seed"),
        _of_both(_SETTINGS, methods(*TABLE_2), seeds(3)),
    ),
    "sngan-twice-as-long": Grid(
        "The rows of Table 2 with twice the updates, under setting C",
        ("recipe", *_OF_A_METHOD, "seed"),
        _of_both(_C, methods(*_TWICE), values("steps", 200_000), seeds(3)),
    ),
    "sngan-last-width": Grid(
        "Width of the discriminator's last layer, STL10, setting C (Figure 4)",
        ("norm", "last_width", "seed"),
        product("stl10", _C, methods("orthonormal", "sn"), values("last_width", 0.5, 1.0, 2.0, 4.0, 8.0), seeds(3)),
    ),
    "sngan-n-dis": Grid(
        "Discriminator steps per generator step, CIFAR10, setting D (Figure 11)",
        ("norm", "n_dis", "seed"),
        product("cifar10", _D, methods("weight-norm", "sn"), values("n_dis", 1, 2, 5, 10, 20), seeds(3)),
    ),
}
