"""The training loop of the papers as named phases, and its whole state."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import fastsn
from gan import checkpoint, models, report, run
from gan.config import Config
from gan.data import Batches, Dataset, Noise, to_uint8
from gan.evaluate import Evaluator
from gan.losses import hinge_d, hinge_g

_log = logging.getLogger("gan")
_GRID = 10


def pick_device(name: str) -> torch.device:
    """The device of a config. Raises ValueError for "cuda" without one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be 'auto' or 'cpu' on a machine without CUDA, got 'cuda'")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


class Training:
    """Networks, optimizers, samplers and the step they are at: everything a checkpoint must hold."""

    def __init__(self, config: Config, dataset: Dataset, device: torch.device) -> None:
        self.config, self.device, self.step = config, device, 0
        seeds = torch.randint(2**62, (4,), generator=torch.Generator().manual_seed(config.seed)).tolist()
        channels = dataset.images.shape[1]
        generator, discriminator = models.build(
            config.variant, config.scale, config.latent, channels, config.image_size, config.width, seeds[0]
        )
        self.generator, self.discriminator = generator.to(device), discriminator.to(device)
        betas = (config.beta1, config.beta2)
        self.optimizer_g = torch.optim.Adam(generator.parameters(), lr=config.lr_g, betas=betas)
        self.optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=config.lr_d, betas=betas)
        self.batches = Batches(dataset, config.batch_size, seeds[1], device)
        self.noise = Noise(config.latent, seeds[2], device)
        self.fixed_z = Noise(config.latent, seeds[3], device).next(_GRID * _GRID)
        self._parts: dict[str, Any] = {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "optimizer_g": self.optimizer_g,
            "optimizer_d": self.optimizer_d,
        }
        self._streams = {"batches": self.batches.generator, "noise": self.noise.generator}

    def state(self, seconds: float) -> dict[str, Any]:
        """A checkpoint; u and v are buffers of the discriminator."""
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        streams = {name: stream.get_state() for name, stream in self._streams.items()}
        return {**parts, **streams, "torch_rng": torch.get_rng_state(), "step": self.step, "seconds": seconds}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        for name, stream in self._streams.items():
            stream.set_state(state[name])
        torch.set_rng_state(state["torch_rng"])
        self.step = state["step"]

    def advance(self) -> dict[str, Tensor]:
        """One step: n_dis discriminator steps, each on a fresh batch, then the generator's with the last z."""
        for _ in range(self.config.n_dis):
            real, z = self.batches.next(), self.noise.next(self.config.batch_size)
            scalars = self._discriminator_step(real, z)
        scalars["loss/g"] = self._generator_step(z)
        self.step += 1
        return scalars

    def _use_of_discriminator(self) -> contextlib.AbstractContextManager[None]:
        """per_forward: every forward iterates and stores. per_d_step: forwards iterate from what is stored."""
        if self.config.u_schedule == "per_forward":
            return contextlib.nullcontext()
        return fastsn.step(self.discriminator, advance=False)

    def _discriminator_step(self, real: Tensor, z: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            fake = self.generator(z)
        with self._use_of_discriminator():
            on_real, on_fake = self.discriminator(real), self.discriminator(fake)
            loss = hinge_d(on_real, on_fake)
            self.optimizer_d.zero_grad()
            loss.backward()
        self.optimizer_d.step()
        if self.config.u_schedule == "per_d_step":
            fastsn.warm_up(self.discriminator, 1)
        self.last = real, fake
        return {"loss/d": loss.detach(), "D/real": on_real.detach().mean(), "D/fake": on_fake.detach().mean()}

    def _generator_step(self, z: Tensor) -> Tensor:
        self.discriminator.requires_grad_(False)
        with self._use_of_discriminator():
            loss = hinge_g(self.discriminator(self.generator(z)))
            self.optimizer_g.zero_grad()
            loss.backward()
        self.optimizer_g.step()
        self.discriminator.requires_grad_(True)
        return loss.detach()

    def slopes(self) -> dict[str, Tensor]:
        """Mean, least and greatest norm of the gradient of D at the last real and fake images; u and v stay."""
        found = {}
        with fastsn.step(self.discriminator, advance=False):
            for name, images in zip(("real", "fake"), self.last, strict=True):
                points = images.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self.discriminator(points).sum(), points)
                norms = gradient.flatten(1).norm(dim=1)
                found |= {f"slope/{name}_{how}": getattr(norms, how)() for how in ("mean", "min", "max")}
        return found

    def sigmas(self) -> dict[str, float]:
        """sigma, sigma_out and sigma_in of every layer, as TensorBoard tags."""
        found = {}
        for layer, values in fastsn.sigmas(self.discriminator).items():
            found |= {f"{kind}/{layer}": x for kind, x in values._asdict().items()}
        return found

    @torch.no_grad()
    def samples(self) -> Tensor:
        """uint8 images of the fixed z, batch norm by its running statistics."""
        images = to_uint8(self.generator.eval()(self.fixed_z))
        self.generator.train()
        return images


def train(training: Training, evaluator: Evaluator, resume: bool) -> None:
    """Train to the last step, with ``resume`` from the newest whole checkpoint. The folder must be claimed."""
    config = training.config
    torch.manual_seed(config.seed)
    state = checkpoint.newest(config.folder / "checkpoint") if resume else None
    if state is not None:
        training.load(state)
    if training.step >= config.steps:
        _log.info("%s is complete at step %d", config.folder, training.step)
        return
    bar = tqdm(total=config.steps, initial=training.step, unit="it", desc=config.name, mininterval=0.5)
    outputs = run.Outputs(config.folder, training.step, state["seconds"] if state else 0.0)
    with logging_redirect_tqdm(), bar, outputs:
        while training.step < config.steps:
            _one_step(training, evaluator, outputs, bar)


def _one_step(training: Training, evaluator: Evaluator, outputs: run.Outputs, bar: tqdm[Any]) -> None:
    config, step = training.config, training.step + 1
    timed = step in (1, config.steps) or step % 1000 == 0
    if timed:
        outputs.time(step, "starts")
    scalars = training.advance()
    bar.update()

    def due(every: int) -> bool:
        return step % every == 0 or step == config.steps

    if due(config.log_every):
        outputs.scalars(step, {**scalars, **training.slopes(), **training.sigmas()})
        bar.set_postfix(loss_d=f"{float(scalars['loss/d']):.3f}", loss_g=f"{float(scalars['loss/g']):.3f}")
    if due(config.sample_every):
        outputs.sample(step, report.grid(training.samples(), _GRID))
    if due(config.eval_every):
        scores = evaluator(training.generator, config.latent)
        outputs.metrics(step, *vars(scores).values(), evaluator.protocol)
        _log.info("step %d: FID %.3f, score %.3f ± %.3f (%s)", step, *vars(scores).values(), evaluator.protocol)
    if due(config.checkpoint_every):
        outputs.flush()
        checkpoint.save(checkpoint.of_step(config.folder / "checkpoint", step), training.state(outputs.seconds))
        checkpoint.prune(config.folder / "checkpoint", config.keep_checkpoints)
    if timed:
        outputs.time(step, "ends")
