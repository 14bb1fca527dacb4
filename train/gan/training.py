"""The networks of a run, what updates them, and the two steps: everything a checkpoint must hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gan import models, norms, streams
from gan.config import Numbers
from gan.data.images import dequantized, to_float
from gan.distributed import ranks
from gan.losses import LOSSES, gradient_penalty


class Training:
    """Networks, optimizers and the step they are at. ``next_batch`` gives (uint8 images, labels or None) of the next
    discriminator step; random numbers are functions of the seed and the step."""

    def __init__(self, config: Numbers, channels: int, classes: int, device: torch.device) -> None:
        self.config, self.classes, self.device, self.step = config, classes, device, 0
        generator, discriminator = models.build(config, channels, classes)
        self.generator, self.discriminator = generator.to(device), discriminator.to(device)
        self.norm, self.loss = norms.Norm(config, self.discriminator), LOSSES[config.loss]
        betas = (config.beta1, config.beta2)
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), lr=config.lr_g, betas=betas)
        self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), lr=config.lr_d, betas=betas)
        self._parts: dict[str, Any] = {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "optimizer_g": self.optimizer_g,
            "optimizer_d": self.optimizer_d,
        }
        self.average: nn.Module | None = None
        if config.ema:
            self.average = AveragedModel(self.generator, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
            self._parts["average"] = self.average
        self._g, self._d = self.generator, self.discriminator
        if config.compile:
            self._g, self._d = torch.compile(self.generator), torch.compile(self.discriminator)

    def state(self) -> dict[str, Any]:
        """A checkpoint; u and v are buffers of the discriminator."""
        return {"step": self.step, **{name: part.state_dict() for name, part in self._parts.items()}}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self.step = state["step"]

    @property
    def evaluated(self) -> nn.Module:
        """The generator whose images are scored and shown: the average where there is one."""
        return self.generator if self.average is None else self.average.module

    def advance(self, batches: Iterator[tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
        """One step, with n_dis batches."""
        self._set_learning_rates()
        scalars: dict[str, Tensor] = {}
        if self.config.order == "g_first":
            scalars["loss/g"] = self._generator_step(*self._fresh())
        for i in range(self.config.n_dis):
            images, labels = next(batches)
            z, fake_labels = self._draw("d", self.config.batch_size, i)
            scalars |= self._discriminator_step(self._floats(images, i), labels, z, fake_labels, i)
        if self.config.order == "d_first":
            again = (z, fake_labels) if self.config.z_of_g == "reused" else self._fresh()
            scalars["loss/g"] = self._generator_step(*again)
        if isinstance(self.average, AveragedModel):
            self.average.update_parameters(self.generator)
        self.step += 1
        return scalars

    def _draw(self, of: str, count: int, i: int = 0) -> tuple[Tensor, Tensor | None]:
        """z and labels for fakes."""
        seed, moment = self.config.seed, (self.step, i)
        z = streams.normal(seed, f"z of {of}", (count, self.config.latent), *moment).to(self.device)
        if not self.classes:
            return z, None
        return z, streams.labels(seed, f"labels of {of}", count, self.classes, *moment).to(self.device)

    def _floats(self, images: Tensor, i: int) -> Tensor:
        """Real images as the discriminator sees them. Noise is drawn image by image: a rank draws its own only."""
        if not self.config.dequantize:
            return to_float(images)
        first = ranks().share(self.config.batch_size).start
        moments = [(self.step, i, number) for number in range(first, first + len(images))]
        noise = [streams.uniform(self.config.seed, "dequantization", images.shape[1:], *m) for m in moments]
        return dequantized(images, torch.stack(noise).to(self.device))

    def _fresh(self) -> tuple[Tensor, Tensor | None]:
        return self._draw("g", self.config.batch_size_g or self.config.batch_size)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _scores(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """At least float32, whatever the networks compute in."""
        with self._autocast():
            scores: Tensor = self._d(images, labels)
        return _wide(scores)

    def _fakes(self, z: Tensor, labels: Tensor | None) -> Tensor:
        with self._autocast():
            images: Tensor = self._g(z, labels)
        return _wide(images)

    def _discriminator_step(
        self, real: Tensor, labels: Tensor | None, z: Tensor, fake_labels: Tensor | None, i: int
    ) -> dict[str, Tensor]:
        moving = contextlib.nullcontext() if self.config.batch_norm_in_d_steps else _batch_norm_stays(self.generator)
        with torch.no_grad(), moving:
            fake = self._fakes(z, fake_labels)
        with self.norm.during_a_step():
            on_real, on_fake = self._scores(real, labels), self._scores(fake, fake_labels)
            loss = self.loss.d(on_real, on_fake)
            scalars = {"loss/d": loss.detach(), "D/real": on_real.detach().mean(), "D/fake": on_fake.detach().mean()}
            if self.config.gradient_penalty:
                alpha = streams.uniform(self.config.seed, "penalty", (len(real), 1, 1, 1), self.step, i).to(self.device)
                penalty = gradient_penalty(lambda x: self._scores(x, labels), real, fake, alpha)
                scalars["loss/penalty"] = penalty.detach()
                loss = loss + self.config.gradient_penalty * penalty
            self.optimizer_d.zero_grad()
            loss.backward()
        self.optimizer_d.step()
        self.norm.after_a_d_step()
        self.last = real, labels, fake, fake_labels
        return scalars

    def _generator_step(self, z: Tensor, labels: Tensor | None) -> Tensor:
        self.discriminator.requires_grad_(False)
        with self.norm.during_a_step():
            loss = self.loss.g(self._scores(self._fakes(z, labels), labels))
            self.optimizer_g.zero_grad()
            loss.backward()
        self.optimizer_g.step()
        self.discriminator.requires_grad_(True)
        return loss.detach()

    def _set_learning_rates(self) -> None:
        """Of this step, linear from ``decay_from`` on."""
        begin, end = self.config.decay_from, self.config.steps
        factor = min(1.0, (end - self.step) / (end - begin)) if begin >= 0 else 1.0
        for optimizer, rate in ((self.optimizer_g, self.config.lr_g), (self.optimizer_d, self.config.lr_d)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor

    @torch.no_grad()
    def images(self, purpose: str, first: int, count: int) -> Tensor:
        """float32 images of z number first, first + 1, ... of a purpose; batch norm by its running statistics."""
        net, training = self.evaluated, self.evaluated.training
        z = streams.numbered(self.config.seed, purpose, first, count, self.config.latent).to(self.device)
        labels = streams.numbered_labels(first, count, self.classes).to(self.device) if self.classes else None
        images: Tensor = net.eval()(z, labels)
        net.train(training)
        return images


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


@contextlib.contextmanager
def _batch_norm_stays(generator: nn.Module) -> Iterator[None]:
    """Batches are normalised by their own statistics, and the running ones do not move."""
    found = [m for m in generator.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    try:
        for module in found:
            module.track_running_stats = False
        yield
    finally:
        for module in found:
            module.track_running_stats = True
