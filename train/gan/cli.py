"""What the command line of every recipe shares: presets, --dry-run, and errors as one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gan import loop
from gan.config import Config
from gan.data.store import Store
from gan.training import Training

Presets = Mapping[str, Mapping[str, Any]]
_log = logging.getLogger("gan")


def train(config: Config, store: Store, resume: bool = False, dry_run: bool = False) -> None:
    """Train, continue, or with ``dry_run`` say what would be trained."""
    if dry_run:
        print(described(config, store))
    else:
        loop.train(config, store, resume)


def described(config: Config, store: Store) -> str:
    """The whole configuration, the networks and their parameters, the folder, the size of a checkpoint."""
    loop.check_data(config, store)
    training = Training(config, store.channels, store.classes, loop.pick_device("cpu"))
    parts = [json.dumps(dataclasses.asdict(config), indent=2, default=str)]
    floats = 0
    for name, net in (("generator", training.generator), ("discriminator", training.discriminator)):
        count = sum(p.numel() for p in net.parameters())
        floats += 3 * count + sum(b.numel() for b in net.buffers())
        parts += [str(net), f"{name}: {count:,} parameters"]
    floats += sum(x.numel() for x in training.evaluated.state_dict().values()) if training.average is not None else 0
    sizes = f"{store.count:,} images of {store.channels} x {store.image_size} x {store.image_size}"
    parts += [f"data: {store.name}, {sizes}, {store.classes} classes, key {store.key}"]
    parts += [
        f"folder: {config.folder}",
        f"checkpoint: about {4 * floats / 1e6:.1f} MB, {config.keep_checkpoints} kept",
    ]
    return "\n".join(parts)


def start(main: Callable[..., None], presets: Presets | None = None, arguments: Sequence[str] | None = None) -> None:
    """Call ``main`` with the command line. ``--preset NAME`` stands for the flags of a row of ``presets``; flags beside
    it win. A mistake of the user or a fault of a disk ends in one line and status 1."""
    import tyro  # only a command line needs it, so that recipes can be imported where it is not installed

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    said = io.StringIO()
    try:
        given = _with_preset(list(sys.argv[1:] if arguments is None else arguments), presets or {})
        with contextlib.redirect_stderr(said):
            call = tyro.cli(_later(main), args=given, config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except SystemExit as ended:
        if ended.code:
            sys.exit(f"error: {_one_line(said.getvalue())}")
        raise
    try:
        call()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _later(main: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """``main`` with its signature, that gives what calls it: what it prints is not the parser's."""
    import functools

    @functools.wraps(main)
    def parsed(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return lambda: main(*args, **kwargs)

    return parsed


def _with_preset(given: list[str], presets: Presets) -> list[str]:
    """The flags of the preset that is named, then those given, without its name: of two the last one counts."""
    names = [i for i, x in enumerate(given) if x == "--preset" or x.startswith("--preset=")]
    if not names:
        return given
    at = names[-1]
    name = given[at].partition("=")[2] if "=" in given[at] else (given[at + 1 : at + 2] or [""])[0]
    if name not in presets:
        raise ValueError(f"preset must be one of {', '.join(presets) or 'none here'}, got {name!r}")
    rest = given[:at] + given[at + (1 if "=" in given[at] else 2) :]
    flags: list[str] = []
    for field, value in presets[name].items():
        flag = f"--{field.replace('_', '-')}"
        flags += ([flag] if value else []) if isinstance(value, bool) else [flag, str(value)]
    return flags + rest


def _one_line(text: str) -> str:
    """What a box of the parser says."""
    words = re.sub(r"[╭╮╰╯│─]+", " ", text).split("For full helptext")[0]
    return " ".join(words.split()) or "bad command line"
