"""The papers' comparisons in miniature, on 1,797 real handwritten digits: runs of about a minute on one CPU core."""

from __future__ import annotations

from gan.sweep.grid import Fields, Grid, product, scaled, seeds

BASE: Fields = {
    "steps": 1000,
    "batch_size": 16,
    "n_dis": 1,
    "width": 0.125,
    "channels_last": True,
    "u_schedule": "per_d_step",
    "lr_g": 4e-4,
    "lr_d": 4e-4,
    "eval_every": 250,
    "checkpoint_every": 1000,
    "sample_every": 1000,
}
_SCALES = (0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6, 2.0, 2.8)  # the papers' end at 1.6; here scores still rise there
GRIDS = {
    "digits-scales": Grid(
        "Scores against scale, as bsn-cnn's first group",
        ("norm", "scale", "seed"),
        product("digits", [BASE], seeds(5), [*scaled("ssn", *_SCALES), *scaled("bssn", *_SCALES)]),
    ),
}
