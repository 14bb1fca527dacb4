"""The papers' comparisons in miniature, on 1,797 real handwritten digits: runs of about a minute on one CPU core. Their
results are in train/results/digits."""

from __future__ import annotations

from gan.sweep.grid import Fields, Grid, product, scaled, seeds, values
from grids.sngan import TABLE_2, methods

BASE: Fields = {"steps": 1000, "eval_every": 250, "checkpoint_every": 1000, "sample_every": 1000}  # the rest: digits.py
_LOGGED: list[Fields] = [{**BASE, "log_gradients": True, "log_variances": True}]
BEST_SCALE = 2.0  # of bssn in digits-scales
_SCALES = (0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6, 2.0, 2.8)  # the papers' end at 1.6, where scores still rise here
_RATES: list[Fields] = [{"lr_g": g, "lr_d": d} for g in (1e-4, 2e-4, 4e-4) for d in (1e-4, 2e-4, 4e-4)]
_SETTING_A: Fields = {"lr_g": 1e-4, "lr_d": 1e-4, "beta1": 0.5, "beta2": 0.9, "n_dis": 5}
_SN_AND_BSSN: list[Fields] = [{"norm": "sn"}, {"norm": "bssn", "scale": BEST_SCALE}]

GRIDS = {
    "digits-scales": Grid(
        "Scores against scale, as bsn-cnn's first group",
        ("norm", "scale", "seed"),
        product("digits", [BASE], seeds(5), [*scaled("ssn", *_SCALES), *scaled("bssn", *_SCALES)]),
    ),
    "digits-settings": Grid(
        "SN and BSSN at its best scale under nine pairs of learning rates and SN-GAN's setting A, as bsn-cnn's other "
        "groups",
        ("norm", "lr_g", "lr_d", "beta2", "n_dis", "seed"),
        product("digits", [BASE], seeds(5), [*_RATES, _SETTING_A], _SN_AND_BSSN),
    ),
    "digits-table-2": Grid(
        "The rows of SN-GAN's Table 2 at one setting, and no normalization and BSSN at its best scale",
        ("norm", "loss", "gradient_penalty", "steps", "seed"),
        [
            *product("digits", _LOGGED, seeds(3), methods(*TABLE_2, "no-norm")),
            *product("digits", _LOGGED, seeds(3), methods("orthonormal", "sn", "sn-hinge"), values("steps", 2000)),
            *product("digits", _LOGGED, seeds(3), [{**methods("bssn")[0], "scale": BEST_SCALE}]),
        ],
    ),
}
