"""The network of a protocol, and how images are shown to it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gan.data.store import Store
from gan.devices import tf32
from gan.distributed import ranks
from gan.metrics import digits, features, protocols
from gan.metrics.protocols import Protocol

_log = logging.getLogger("gan")
Images = Callable[[int, int], Tensor]  # called with (first, count)


def images_of(store: Store, index: np.ndarray) -> Images:
    """Number k is image index[k] of the store, uint8."""
    return lambda first, count: torch.from_numpy(store.read(index[first : first + count])).permute(0, 3, 1, 2)


class Judge:
    """Looks at images of the size of a store's, through the network of a protocol.

    Of several ranks, each looks at whole batches, so that features do not depend on how many ranks there are.

    Args:
        store: the reals.
        protocol: a name of protocols.PROTOCOLS, or a row of one's own.
        device: where the network runs.
        inception_weights: the weights of Inception, see features.inception.
        cache: a folder of the first rank, for the statistics of the reals and for the digit classifier.
        batch_size: how many images at a time.
        network: a module from pixels to (features, logits), in place of the protocol's.

    ``network`` is None where ``missing`` says that it is not here, or on one of the ranks.

    Raises:
        ValueError: the store does not suit the protocol, the weights are not the network's, or ranks have others.
        FileNotFoundError: weights were named that are not there.
    """

    def __init__(
        self,
        store: Store,
        protocol: str | Protocol,
        device: torch.device,
        inception_weights: Path | None,
        cache: Path,
        batch_size: int,
        network: nn.Module | None = None,
    ) -> None:
        self.store, self.device, self.cache, self.batch_size = store, device, cache, batch_size
        self.protocol = protocols.find(protocol) if isinstance(protocol, str) else protocol
        self.missing, self.network, team = "", None, ranks()
        with team.together():
            self._check_store(own_network=network is not None)
            try:
                found = features.with_checksum(network) if network else self._load(inception_weights)
                self.network = found._replace(module=found.module.to(device).eval().requires_grad_(False))
            except features.MissingNetwork as error:
                self.missing = str(error)
        try:
            with team.together():  # what one rank misses, all do
                if self.missing:
                    raise ValueError(self.missing)
        except ValueError as error:
            self.missing, self.network = str(error), None
            if team.first:
                _log.warning("no scores by the protocol %s: %s", self.protocol.name, error)
        team.same("the network's weights", self.network.checksum if self.network else "")

    def _check_store(self, own_network: bool) -> None:
        least = max(self.protocol.reals or 2, protocols.KID_SUBSET_SIZE if self.protocol.kid else 2)
        if self.store.count < least:
            raise ValueError(
                f"protocol: expected at least {least} images for {self.protocol.name}, got {self.store.name} with "
                f"{self.store.count}"
            )
        if self.protocol.network != "digits" and not own_network and self.store.channels != 3:
            raise ValueError(
                f"protocol: expected images of 3 channels for {self.protocol.name}, got {self.store.name} with "
                f"{self.store.channels}"
            )

    def _load(self, inception_weights: Path | None) -> features.Network:
        if self.protocol.network == "inception":
            return features.inception(inception_weights, self.protocol.scale)
        if self.protocol.network == "lite0":
            return features.lite0(self.protocol.scale)
        return digits.digit_classifier(self.store, self.protocol.scale, self.cache)

    def feed(self, images: Images, total: int, take: Callable[[Tensor, Tensor, Tensor], None]) -> int | None:
        """Show the network images number 0 to total - 1, batch b on rank b % size.

        images: as ``generate`` is. take: called with (number (n,), features (n, D), logits (n, K)) of each batch, with
        n = 0 on a rank that has none, so that it knows D and K. All ranks call this.

        Returns: where all images are finite None, otherwise the number with which the first batch begins in which they
        are not; its rank stopped there.
        """
        team, first_bad = ranks(), total
        firsts = range(team.rank * self.batch_size, total, team.size * self.batch_size)
        with team.together():
            for first in firsts or range(1):
                count = min(self.batch_size, total - first)
                batch = images(first, count)
                self._check_shape(batch, count)
                if not batch.isfinite().all():
                    first_bad = first
                    break
                found, logits = self._forward(self.protocol.to_pixels(batch.to(self.device)))
                own = count if firsts else 0
                take(torch.arange(first, first + own, device=self.device), found[:own], logits[:own])
        each = torch.zeros(team.size, dtype=torch.int64)
        each[team.rank] = first_bad
        team.sum_([each])
        bad = int(each.min())
        return bad if bad < total else None

    def _check_shape(self, images: Tensor, count: int) -> None:
        expected = (count, self.store.channels, self.store.image_size, self.store.image_size)
        if images.shape != expected:
            raise ValueError(f"generate: expected images of shape {expected}, got {tuple(images.shape)}")

    def _forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, enabled=False), tf32(self.device, allowed=False):
            found, logits = self.network.module(pixels)
        return found, logits
