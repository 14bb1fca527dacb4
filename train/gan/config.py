"""What a run is: ``Numbers`` decide its result and are compared on --resume, ``Runtime`` is how it is carried out."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Norm = Literal["none", "sn", "ssn", "bsn", "bssn", "sn_conv", "wn", "ln", "bn", "clip", "orthonormal"]
Gamma = Literal["none", "same", "different"]
Loss = Literal["hinge", "standard", "wasserstein"]
Schedule = Literal["per_forward", "per_step", "per_d_step"]
Architecture = Literal["bsn", "sngan", "bsn-resnet", "sngan-resnet"]
ZOfG = Literal["reused", "fresh"]
Conditional = Literal["none", "projection", "concat"]
RESNET_SIZES = (32, 48, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Every number that the weights of a run depend on, beside the data. One step is n_dis steps of the discriminator
    and one of the generator."""

    norm: Norm = "sn"
    """How the discriminator is normalized: its weights by their spectral norm (sn), two of them (bsn), either times a
    constant (ssn, bssn), by the norm of a convolution as an operator (sn_conv), row by row (wn); the outputs of its
    convolutions (ln, bn); weights that are clipped, or orthonormal at the start and by a penalty."""
    scale: float = 1.0
    """The constant c of ssn, bssn and sn_conv."""
    gamma: Gamma = "none"
    """A trainable factor of weights and biases, 1 at first: one for all layers (same) or one for each (different);
    of sn, ssn, bsn and bssn."""
    clip: float = 0.01
    """Of norm clip: the largest absolute value of a parameter of the discriminator after each of its steps (0.01 is
    that of Arjovsky et al., ICML 2017, and of SN-GAN)."""
    orthonormal_penalty: float = 1e-4
    """Of norm orthonormal: weight of the sum of |W'W - I|^2 over the discriminator's weights. SN-GAN does not say its
    own; 1e-4 is what Brock et al., ICLR 2019 (BigGAN), have for a relative of it."""
    loss: Loss = "hinge"
    gradient_penalty: float = 0.0
    """Weight of (|gradient of D at a point between real and fake| - 1)^2."""
    u_schedule: Schedule = "per_d_step"
    """When u and v are stored: at every forward of the discriminator (torch, Chainer); once for all forwards of a step
    of either network (BigGAN); once after each discriminator step, from the updated weights (the BSN authors)."""
    seed: int = 0
    steps: int = 100_000
    """Generator steps."""
    batch_size: int = 64
    """Images, and fakes, of a discriminator step, of all processes together."""
    batch_size_g: int = 0
    """Fakes of a generator step; 0: as many."""
    n_dis: int = 1
    """Discriminator steps per generator step."""
    order: Literal["d_first", "g_first"] = "d_first"
    z_of_g: ZOfG = "reused"
    """Whether the generator's step takes the z of the last discriminator step."""
    batch_norm_in_d_steps: bool = True
    """Whether the generator's running statistics move in discriminator steps, too."""
    lr_g: float = 1e-4
    lr_d: float = 1e-4
    beta1: float = 0.5
    beta2: float = 0.999
    decay_from: int = -1
    """Step from which both learning rates fall linearly to 0 at the last one; -1: never."""
    ema: float = 0.0
    """Decay of an average of the generator's weights, which is then what is evaluated; 0: none."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: networks under autocast; scores, losses, penalties and evaluation stay float32."""
    tf32: bool = True
    """Whether GPUs may round the factors of float32 products to TF32."""
    channels_last: bool = False
    """Memory format of images and of convolutions' weights."""
    compile: bool = False
    """Whether both networks are compiled; with a gradient penalty the generator alone, as torch.compile has no second
    derivative."""
    architecture: Architecture = "bsn"
    """The CNN of the BSN authors' code, or of the SN-GAN paper (no batch norm after the generator's dense layer); the
    residual networks of either."""
    conditional: Conditional = "none"
    """How labels are used, in residual networks: by the discriminator as a projection or as channels in the middle, and
    by the generator in its batch norms."""
    bn_groups: int = 1
    """The generator's batch norms take statistics of each of so many equal parts of the batch, whatever the number of
    processes: 4 is what four GPUs with a part each do."""
    picks: Literal["with_replacement", "by_epochs"] = "with_replacement"
    """Each real image independent of all others (BSN), or every image once an epoch (SN-GAN)."""
    dequantize: bool = False
    """Whether real images are x / 128 - 1 + U(0, 1/128), as the SN-GAN authors scale, instead of x / 127.5 - 1."""
    latent: int = 128
    """Length of z."""
    width: float = 1.0
    """Factor on every channel count of both networks."""
    last_width: float = 1.0
    """Of a CNN: one more factor, on the channels of the discriminator's last convolution (SN-GAN, Fig. 4)."""
    image_size: int = 32
    """Pixels a side: a multiple of 8 up to 256; of residual networks 32, 48, 64 or 128."""

    @property
    def compiled(self) -> tuple[str, ...]:
        """Which networks are compiled."""
        if not self.compile:
            return ()
        return ("generator",) if self.gradient_penalty else ("generator", "discriminator")

    def identity(self) -> dict[str, Any]:
        """These fields, as plain values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(Numbers)}
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What changes no weight: where a run is, on what, and what it says of itself how often."""

    name: str
    """Folder of the run below --runs."""
    runs: Path = Path("runs")
    """Parent of all run folders."""
    protocol: str = "bsn"
    """How the generator is scored."""
    inception_weights: Path | None = None
    """Of torch-fidelity's Inception; default: $FASTSN_INCEPTION, then torch hub's cache. Nothing is downloaded."""
    eval_every: int = 10_000
    """Steps between rows of metrics.csv; there is one after the last step too. 0: none at all."""
    sample_every: int = 200
    """Steps between sample grids."""
    log_every: int = 100
    """Steps between points of the scalars."""
    log_gradients: bool = False
    """Log the norm of dL/dW of every layer of the discriminator, too: 0.04 % of the time of digits.py's steps."""
    log_variances: bool = False
    """Log the variance of every layer's normalized weight, too: 0.08 % of the time of digits.py's steps (CPU time of
    one thread, with its --log-every 50; the slopes that are always logged take 0.7 %)."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints; there is one after the last step too."""
    keep_checkpoints: int = 5
    """How many of the newest checkpoints stay."""
    lockstep_every: int = 1000
    """Steps between checks that all processes hold the same weights, u and v."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a CUDA device if there is one, under torchrun the one of the process's local rank."""
    cuda_graph: bool = False
    """Whether a step of both networks is captured into a CUDA graph and replayed: Python then asks for one launch and
    not for each kernel. On one GPU, without compile; weights differ by rounding."""
    resident_gb: float = 4.0
    """Data sets up to this size are kept on the device."""
    workers: int = 8
    """Threads of a process that read larger ones."""
    stage: Path | None = None
    """A folder on a disk of each node to which the data is copied first, once per node."""

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.runs / self.name


@dataclass(frozen=True, kw_only=True)
class Config(Numbers, Runtime):
    """A run; recipes set the defaults that suit their data."""

    def __post_init__(self) -> None:
        for field, kind in _CHOICES.items():
            _require(
                getattr(self, field) in get_args(kind),
                field,
                f"one of {', '.join(get_args(kind))}",
                getattr(self, field),
            )
        _require(self.batch_size >= 2, "batch_size", "at least 2 (batch norm)", self.batch_size)
        _require(self.batch_size_g == 0 or self.batch_size_g >= 2, "batch_size_g", "0 or at least 2", self.batch_size_g)
        for field in (
            "steps",
            "n_dis",
            "latent",
            "sample_every",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "lockstep_every",
            "workers",
            "bn_groups",
        ):
            _require(getattr(self, field) >= 1, field, "at least 1", getattr(self, field))
        _require(self.eval_every >= 0, "eval_every", "at least 0", self.eval_every)
        for field in ("lr_g", "lr_d", "width", "last_width", "scale", "clip"):
            value = getattr(self, field)
            _require(0 < value < float("inf"), field, "finite and positive", value)
        for field in ("gradient_penalty", "orthonormal_penalty", "resident_gb"):
            value = getattr(self, field)
            _require(0 <= value < float("inf"), field, "finite and at least 0", value)
        for field in ("beta1", "beta2", "ema"):
            _require(0 <= getattr(self, field) < 1, field, "in [0, 1)", getattr(self, field))
        size = self.image_size
        _require(8 <= size <= 256 and size % 8 == 0, "image_size", "a multiple of 8 up to 256", size)
        residual = self.architecture.endswith("resnet")
        _require(
            not residual or size in RESNET_SIZES, "image_size", f"one of {RESNET_SIZES} for residual networks", size
        )
        _require(
            residual or self.conditional == "none",
            "conditional",
            "'none' with a CNN (residual networks take labels)",
            self.conditional,
        )
        wanted = "1.0 with residual networks (the CNN takes another)"
        _require(not residual or self.last_width == 1, "last_width", wanted, self.last_width)
        for field in ("batch_size", "batch_size_g"):
            value, groups = getattr(self, field), self.bn_groups
            _require(
                value % groups == 0 and (value == 0 or value >= 2 * groups),
                field,
                f"a multiple of bn_groups {groups}, 2 or more in each",
                value,
            )
        _require(-1 <= self.decay_from < self.steps, "decay_from", "-1 or a step before the last", self.decay_from)
        for field, norms in _OF_NORMS.items():
            value, default = getattr(self, field), getattr(Numbers, field)
            others = f"{', '.join(norms)} take{'s' if len(norms) == 1 else ''} another"
            wanted = f"{default!r} with norm {self.norm!r} ({others})"
            _require(self.norm in norms or value == default, field, wanted, value)
        own = self.batch_size_g not in (0, self.batch_size) or self.order == "g_first"
        _require(
            not own or self.z_of_g == "fresh",
            "z_of_g",
            "fresh where G's batch is of another size or comes first",
            self.z_of_g,
        )
        _require(not (self.cuda_graph and self.compile), "cuda_graph", "False with compile", self.cuda_graph)
        parts = Path(self.name).parts
        below = bool(parts) and ".." not in parts and not Path(self.name).is_absolute()
        _require(below, "name", "a folder name below runs", self.name)
        _require(0 <= self.seed < 2**63, "seed", "in [0, 2^63)", self.seed)


_OF_NORMS = {  # fields that only some norms have
    "scale": ("ssn", "bssn", "sn_conv"),
    "gamma": ("sn", "ssn", "bsn", "bssn"),
    "clip": ("clip",),
    "orthonormal_penalty": ("orthonormal",),
}
_CHOICES = {
    "norm": Norm,
    "gamma": Gamma,
    "loss": Loss,
    "u_schedule": Schedule,
    "architecture": Architecture,
    "conditional": Conditional,
}


def _require(holds: bool, field: str, expected: str, came: object) -> None:
    if not holds:
        raise ValueError(f"{field} must be {expected}, got {came!r}")
