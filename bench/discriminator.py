"""The training step that is timed, and the ways to run it: the CNN discriminator of CIFAR10 on as many real as fake
images, hinge loss, backward, Adam.

A mode makes, of a `TrainingStep`, a function that runs it once and returns its loss. `check` compares what that does
with the same step run eagerly, and the normalized weights with their singular values.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import gate
import torch
import torch.nn.functional as F
import workloads
from contestants import SCALE, composed_bssn, fastsn_bssn, torch_spectral_norm
from measure import DEVICE
from torch import Tensor, nn

import fastsn

PLAIN, TORCH = "no normalization", "torch SN"
PER_LAYER, IN_A_STEP, FUSED = "per layer", "in a step", "fused"
WARM_UP = 3  # as many as torch's documentation asks for before a capture
COMPARED = 3  # steps
BACKEND = "inductor"  # of torch.compile
torch._dynamo.config.recompile_limit = 64  # of one function, which is compiled for every contestant
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Normalization:
    """How each layer is normalized, and what has all weights at once: nothing, a step of both forwards, a forward."""

    normalize: Callable[[nn.Module], nn.Module]
    bssn: bool = False
    scope: str = PER_LAYER

    @property
    def scale(self) -> float:
        return SCALE if self.bssn else 1.0


NORMALIZATIONS: dict[str, Normalization | None] = {
    PLAIN: None,
    TORCH: Normalization(torch_spectral_norm),
    "composed BSSN": Normalization(composed_bssn, bssn=True),
    **{f"fastsn SN {x}": Normalization(fastsn.spectral_norm, scope=x) for x in (PER_LAYER, IN_A_STEP, FUSED)},
    **{f"fastsn BSSN {x}": Normalization(fastsn_bssn, True, x) for x in (PER_LAYER, IN_A_STEP, FUSED)},
}


class Setting(NamedTuple):
    """What all contestants of a comparison share."""

    batch: int = 64 if DEVICE.type == "cuda" else 8  # real images, and as many fake ones; 64 is the papers'
    width: int = 64  # channels of the first convolution
    bfloat16: bool = False  # autocast
    layout: torch.memory_format = torch.contiguous_format

    @property
    def precision(self) -> str:
        return "bfloat16 autocast" if self.bfloat16 else "float32"


class Discriminator(nn.Module):
    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        *convolutions, last = self.layers
        for layer in convolutions:
            x = F.leaky_relu(layer(x), 0.1)
        return last(x.flatten(1))


class TrainingStep:
    """A discriminator with its optimizer and its images. The same numbers at every construction."""

    def __init__(self, name: str, setting: Setting, capturable: bool = False) -> None:
        self.normalization, self.setting = NORMALIZATIONS[name], setting
        workload = workloads.Workload(name, workloads.cifar10_cnn(setting.width), "a training step")
        layers = workloads.build(workload, DEVICE).to(memory_format=setting.layout)
        if self.normalization is not None:
            layers = nn.ModuleList([self.normalization.normalize(layer) for layer in layers])
        self.model = Discriminator(layers)
        if self.normalization is not None and self.normalization.scope == FUSED:
            fastsn.fuse(self.model)
        in_a_step = self.normalization is not None and self.normalization.scope == IN_A_STEP
        self.scope = partial(fastsn.step, self.model) if in_a_step else nullcontext
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, betas=(0.5, 0.999), capturable=capturable)
        images = torch.randn(2, setting.batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        self.real, self.fake = (x.to(DEVICE).contiguous(memory_format=setting.layout) for x in images)

    def loss(self) -> Tensor:
        """Of both forwards."""
        with self.scope():
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.setting.bfloat16):
                real, fake = self.model(self.real), self.model(self.fake)
            return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()

    def update(self, loss: Loss | None = None) -> Tensor:
        """The whole step."""
        self.optimizer.zero_grad(set_to_none=True)  # in a capture, so that gradients lie in the graph's memory
        found = (loss or self.loss)()
        found.backward()
        self.optimizer.step()
        return found.detach()

    def optimizer_state(self) -> list[Tensor]:
        return [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]


def eager(train: TrainingStep) -> Loss:
    return train.update


def compiled(train: TrainingStep, mode: str | None = None) -> Loss:
    """Both forwards and the loss in one graph. Not for composed BSSN: inside the graph torch iterates again in
    backward, and iterated before each forward the second changes the vectors that the first's graph has saved."""
    loss = torch.compile(train.loss, fullgraph=True, mode=mode, backend=BACKEND)

    def run() -> Tensor:
        if mode is not None:
            torch.compiler.cudagraph_mark_step_begin()
        return train.update(loss)

    with warnings.catch_warnings():  # the compiler imports modules that torch itself has deprecated
        warnings.simplefilter("ignore")
        run()
    return run


def captured(train: TrainingStep) -> Loss:
    return capture(train.update)


@cache
def _stream_of_captures() -> torch.cuda.Stream:
    """One for all: torch hands out 32 by turns, and the one that a capture is on must not be anybody else's."""
    return torch.cuda.Stream()


def capture(step: Loss) -> Loss:
    """The replay of a step in a CUDA graph, once it has run on the stream of the capture. It returns what the step
    returned, overwritten by each replay."""
    before, side = torch.cuda.current_stream(), _stream_of_captures()
    side.wait_stream(before)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                step()
        before.wait_stream(side)
        with torch.cuda.graph(graph, stream=side):
            result = step()
    finally:  # a capture that fails leaves its own stream
        torch.cuda.set_stream(before)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


MODES: dict[str, Callable[[TrainingStep], Loss]] = {
    "eager": eager,
    "compiled": compiled,
    "compiled, reduce-overhead": partial(compiled, mode="reduce-overhead"),
    "captured": captured,
}
ON_A_GPU = ("compiled, reduce-overhead", "captured")  # CUDA graphs


def prepared(name: str, mode: str, setting: Setting) -> Loss:
    """What is timed. Raises AssertionError if it computes something wrong."""
    train = TrainingStep(name, setting, capturable=mode == "captured")
    step = MODES[mode](train)
    for _ in range(WARM_UP):
        step()
    if mode != "eager":
        parameters, vectors = list(train.model.parameters()), list(train.model.buffers())
        tolerance = {} if mode == "captured" else {"of_losses": 1e-2, "of_parameters": 0.3}  # other convolutions, TF32
        check_same(step, train.update, parameters, vectors, train.optimizer_state(), **tolerance)
    check_norms(train)
    return step


@torch.no_grad()
def check_norms(train: TrainingStep) -> None:
    """The norm of every weight as a matrix, or the mean of those of both reshapes, is near the scale."""
    own = train.normalization
    if own is None:
        return
    train.model.eval()  # with the vectors as they are
    for i, norms in enumerate(gate.true_norms(train.model.layers)):
        found = statistics.fmean(norms if own.bssn else norms[:1])
        assert 0.9 * own.scale < found < 1.25 * own.scale, f"layer {i} has the norm {found:.3g}, not {own.scale}"
    train.model.train()


@torch.no_grad()
def check_same(
    step: Loss,
    expected: Loss,
    parameters: Sequence[Tensor],
    vectors: Sequence[Tensor],
    rest: Sequence[Tensor] = (),
    of_losses: float = 1e-3,
    of_parameters: float = 0.1,
) -> None:
    """Three steps from the same state return the same losses, and move parameters and vectors alike.

    By the distance of the states they end in, in parts of the distance from the first: Adam's first steps are of one
    size whatever the gradient's, and make more of a last bit than any tolerance of single numbers. The vectors start
    turned away from where they are, so that an iteration that is skipped, or done twice, shows.
    """
    for x in vectors:
        x.copy_(F.normalize(x + 0.5 * F.normalize(torch.randn(x.shape), dim=0).to(x.device), dim=0))
    state = [*parameters, *vectors, *rest]
    start = [x.clone() for x in state]
    losses, ends = [], []
    for run in (step, expected):
        for x, value in zip(state, start, strict=True):
            x.copy_(value)
        with torch.enable_grad():
            losses.append(torch.stack([run().clone() for _ in range(COMPARED)]))
        ends.append([x.clone() for x in state])
    assert bool(losses[1].isfinite().all()), "the loss is not finite"
    torch.testing.assert_close(*losses, rtol=of_losses, atol=1e-4)
    n = len(parameters)
    parts = ("parameters", slice(n), of_parameters), ("vectors", slice(n, n + len(vectors)), 0.1)
    for what, part, tolerance in parts:
        off, moved = _distance(ends[0][part], ends[1][part]), _distance(start[part], ends[1][part])
        assert off <= tolerance * moved, f"{what} are off by {off:.1e} after steps that move them by {moved:.1e}"


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True)) ** 0.5
