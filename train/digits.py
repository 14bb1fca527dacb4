"""Train the paper's GAN on 1,797 real handwritten digits, on a CPU, in about two minutes.

    python train/digits.py --name digits/bssn --variant bssn --scale 1.4
    python train/digits.py --name digits/bssn --variant bssn --scale 1.4 --resume     # continue after an interruption

Writes runs/<name>/: worker.log, metrics.csv, time.txt, config.json, sample/, checkpoint/, tensorboard/.
"""

from __future__ import annotations

from dataclasses import dataclass

from gan import cli, data, evaluate, loop
from gan.config import Config


@dataclass(frozen=True)
class Digits(Config):
    """The digits at 16 x 16, a quarter of the paper's width, Adam of SN-GAN's setting C, two discriminator steps."""

    steps: int = 1600
    batch_size: int = 32
    n_dis: int = 2
    lr_g: float = 2e-4
    lr_d: float = 2e-4
    width: float = 0.25
    image_size: int = 16
    eval_every: int = 200
    eval_fakes: int = 2000
    log_every: int = 50
    checkpoint_every: int = 200


def main(config: Digits, resume: bool = False) -> None:
    """Train, or with --resume continue, one run."""
    device = loop.pick_device(config.device)
    dataset = data.digits(config.image_size)
    training = loop.Training(config, dataset, device)
    with cli.worker(config, resume, device):
        net = evaluate.digit_classifier(dataset, config.runs)
        evaluator = evaluate.Evaluator(dataset, net, net.FEATURES, config.eval_fakes, config.seed, device)
        loop.train(training, evaluator, resume)


if __name__ == "__main__":
    cli.start(main)
