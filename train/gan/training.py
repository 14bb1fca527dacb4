"""The networks of a run, what updates them, and the two steps: everything a checkpoint must hold."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gan import models, norms, optimizers, streams
from gan.average import Average
from gan.captured import CapturedStep, Graph, Scalars
from gan.config import Numbers
from gan.data.images import dequantized, to_float
from gan.devices import tf32
from gan.distributed import ranks
from gan.draws import Drawn, Draws, OfDiscriminator, OfGenerator
from gan.losses import LOSSES, gradient_penalty
from gan.phases import Phases


class Training:
    """Networks, optimizers and the step they are at.

    Under several ranks each has its part of every batch, and gradients, and statistics of batch norms, are averaged:
    all ranks hold the same. u and v are not communicated, since equal weights give equal ones.

    ``graph``: captures what the device does in a step; None: Python asks for it every time.
    """

    def __init__(
        self,
        config: Numbers,
        channels: int,
        classes: int,
        device: torch.device,
        graph: Callable[[torch.device], Graph] | None = None,
    ) -> None:
        self.config, self.classes, self.device, self.step = config, classes, device, 0
        self.ranks, self.phases = ranks(), Phases(device)
        self._draws = Draws(config, classes, device, self.ranks, self.phases)
        generator, discriminator = models.build(config, channels, classes)
        self._format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.generator = generator.to(device, memory_format=self._format)
        self.discriminator = discriminator.to(device, memory_format=self._format)
        self.norm, self.loss = norms.Norm(config, self.discriminator), LOSSES[config.loss]
        betas = (config.beta1, config.beta2)
        self.optimizer_g = optimizers.adam(self.generator, config.lr_g, betas, captured=graph is not None)
        self.optimizer_d = optimizers.adam(self.discriminator, config.lr_d, betas, captured=graph is not None)
        self._parts: dict[str, Any] = {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "optimizer_g": self.optimizer_g,
            "optimizer_d": self.optimizer_d,
        }
        self.average = Average(self.generator, config.ema) if config.ema else None
        if self.average is not None:
            self._parts["average"] = self.average
        self._g = torch.compile(self.generator) if "generator" in config.compiled else self.generator
        self._d = torch.compile(self.discriminator) if "discriminator" in config.compiled else self.discriminator
        self._statistics = [
            x
            for module in self.generator.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for x in (module.running_mean, module.running_var)
        ]
        self._graph = graph
        self._captured = self._not_yet_captured()

    def _not_yet_captured(self) -> CapturedStep | None:
        return None if self._graph is None else CapturedStep(self._carry_out, self._graph(self.device))

    def state(self) -> dict[str, Any]:
        """A checkpoint; u and v are buffers of the discriminator."""
        return {"step": self.step, **{name: part.state_dict() for name, part in self._parts.items()}}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. Raises ValueError for one of other networks."""
        try:
            for name, part in self._parts.items():
                if isinstance(part, torch.optim.Adam):
                    optimizers.load(part, state[name])
                else:
                    part.load_state_dict(state[name])
            self.step = state["step"]
        except (KeyError, RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"resume: expected a checkpoint of this run's networks, got another: {said}") from error
        self._captured = self._not_yet_captured()  # states of optimizers are elsewhere now

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What every rank must hold the same of: parameters, u and v, statistics."""
        for part in ("generator", "discriminator", "average"):
            if part in self._parts:
                for name, x in self._parts[part].state_dict().items():
                    yield f"{part}.{name}", x

    @property
    def evaluated(self) -> nn.Module:
        """The generator whose images are scored and shown: the average where there is one."""
        return self.generator if self.average is None else self.average.module

    def advance(self, batches: Iterator[tuple[Tensor, Tensor | None]]) -> Scalars:
        """One step, with n_dis batches of this rank's part: (uint8 images, labels or None). Scalars are of that part.

        Nothing waits for the device."""
        self._set_learning_rates()
        inputs = self._draws.of_step(self.step, batches)
        if self._captured is None:
            scalars = self._carry_out(inputs)
        else:
            drawn = list(inputs)
            with self.phases.off():
                scalars = self._captured(drawn)
        self.step += 1
        if self.average is not None:
            self.average.n_averaged.fill_(self.step)
        return scalars

    def _carry_out(self, inputs: Iterable[Drawn]) -> Scalars:
        """What the device does in a step, of both networks in the order of their inputs."""
        scalars: Scalars = {}
        with tf32(self.device, self.config.tf32):
            for given in inputs:
                if isinstance(given, OfDiscriminator):
                    scalars |= self._discriminator_step(given)
                else:
                    scalars["loss/g"] = self._generator_step(given)
        self._average_over_ranks(self._statistics)
        if self.average is not None:
            self.average.update_parameters(self.generator)
        return scalars

    def _average_over_ranks(self, tensors: Iterable[Tensor | None]) -> None:
        with self.phases("reduction"):
            self.ranks.mean_(x for x in tensors if x is not None)

    def _floats(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """Real images as the discriminator sees them."""
        floats = to_float(images) if noise is None else dequantized(images, noise)
        return floats.contiguous(memory_format=self._format)

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

    def _discriminator_step(self, given: OfDiscriminator) -> Scalars:
        real, labels, fake_labels = self._floats(given.images, given.noise), given.labels, given.fake_labels
        moving = contextlib.nullcontext() if self.config.batch_norm_in_d_steps else _batch_norm_stays(self.generator)
        with torch.no_grad(), moving, self.phases("generator"):
            fake = self._fakes(given.z, fake_labels)
        with self.phases("discriminator"), self.norm.during_a_step():
            on_real, on_fake = self._scores(real, labels), self._scores(fake, fake_labels)
            loss = self.loss.d(on_real, on_fake)
            scalars = {"loss/d": loss.detach(), "D/real": on_real.detach().mean(), "D/fake": on_fake.detach().mean()}
            if given.alpha is not None:
                penalty = gradient_penalty(lambda x: self._scores(x, labels), real, fake, given.alpha)
                scalars["loss/penalty"] = penalty.detach()
                loss = loss + self.config.gradient_penalty * penalty
            orthonormal = self.norm.penalty()
            if orthonormal is not None:
                scalars["loss/orthonormal"] = orthonormal.detach()
                loss = loss + self.config.orthonormal_penalty * orthonormal
            self.optimizer_d.zero_grad()
            loss.backward()
        self._average_over_ranks(p.grad for p in self.discriminator.parameters())
        with self.phases("discriminator"):
            self.optimizer_d.step()
            self.norm.after_a_d_step()
        self.last = real, labels, fake, fake_labels
        return scalars

    def _generator_step(self, given: OfGenerator) -> Tensor:
        self.discriminator.requires_grad_(False)
        with self.phases("generator"), self.norm.during_a_step():
            loss = self.loss.g(self._scores(self._fakes(*given), given.labels))
            self.optimizer_g.zero_grad()
            loss.backward()
        self._average_over_ranks(p.grad for p in self.generator.parameters())
        with self.phases("generator"):
            self.optimizer_g.step()
        self.discriminator.requires_grad_(True)
        return loss.detach()

    def _set_learning_rates(self) -> None:
        """Of this step, linear from ``decay_from`` on."""
        begin, end = self.config.decay_from, self.config.steps
        factor = min(1.0, (end - self.step) / (end - begin)) if begin >= 0 else 1.0
        for optimizer, rate in ((self.optimizer_g, self.config.lr_g), (self.optimizer_d, self.config.lr_d)):
            optimizers.set_rate(optimizer, rate * factor)

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
    """Batches are normalized by their own statistics, and the running ones do not move."""
    found = [m for m in generator.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    try:
        for module in found:
            module.track_running_stats = False
        yield
    finally:
        for module in found:
            module.track_running_stats = True
