"""Everything there is to know of a GPU, in three parts of nine minutes at most. Nothing is installed.

python .ci/gpu.py 1      # does it work, how fast: tests on the GPU, device time of every kernel, races
python .ci/gpu.py 2      # what users see: a training step, the contestants
python .ci/gpu.py 3      # a step of ImageNet, compute-sanitizer, the tests on the CPU of its machine
python .ci/gpu.py 1 2 3 --rehearse      # without a GPU, in Triton's interpreter: a little of each, to see that it runs

A part leaves one log of all its steps, and what they have measured, in --out. A step that fails does not keep the
others from running, and one whose time is over is interrupted: pytest and the scripts then write what they have.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).parent.parent
LIMIT = 540  # seconds of a part
GRACE = 15  # seconds in which a step that is interrupted may write its results
ON_THE_GPU = ["triton", "gpu", "op_errors", "ops", "layers", "step", "fuse", "recomputation", "state_safety"]
ON_THE_GPU += ["gradients", "parity_with_torch"]
VERSIONS = """
import os, platform, sys, torch, triton, fastsn
print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)
print(*(f"{name}: {found.detail}" for name, found in fastsn.backends().items()), f"{os.cpu_count()} cores", sep="\\n")
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
sys.exit(not (fastsn.backends()["triton"].available or "rehearse" in sys.argv))
"""
# The rule of differentiation in C++; without it the one in Python serves.
BUILD = """
import subprocess, sys, fastsn
if not fastsn.backends()["cpp"].available:
    sys.exit(subprocess.call([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]))
"""
# What ncu shows of each kernel.
SECTIONS = ["SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats"]
KERNELS = "^(iterate|reduce|rescale|inner_products|gradient)$"


class Step(NamedTuple):
    """A command, the seconds it may take (None: what the others leave), and what it needs in its environment."""

    name: str
    seconds: float | None
    command: list[str]
    environment: dict[str, str] = {}  # noqa: RUF012 - never changed


def parts(out: Path, rehearse: bool) -> dict[int, list[Step]]:
    """The steps of every part. A part may be the first that a machine sees."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    count = min(os.cpu_count() or 1, 2 if rehearse else 16)
    # Verbose: where time runs out, the log names what has failed until then.
    workers = [python, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    workers += ["--dist", "worksteal", "-n", str(count)]
    device = {"FASTSN_TEST_ON": "interpreter" if rehearse else "cuda", "OMP_NUM_THREADS": "1"}
    prepare = [
        Step("versions", 40, [python, "-c", VERSIONS, *(["rehearse"] if rehearse else [])]),
        Step("build", 90, [python, "-c", BUILD]),
    ]
    stress = [python, "tests/stress.py", "--launches"]
    times = [python, "bench/device_times.py"]
    on_the_gpu = [f"tests/test_{name}.py" for name in ON_THE_GPU]
    on_its_machine = ["tests"]
    raw, suite = str(out / "raw.json"), str(out / "suite.json")
    # One that is interrupted has not used its fixture, which is no error.
    quiet = ["-W", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning"]
    bench = [f"bench/test_{name}.py" for name in ("normalization", "growth")]
    weights = "the table"
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9"]
    ncu = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--kernel-name", f"regex:{KERNELS}"]
    ncu += [*(f"--section={name}" for name in SECTIONS), "--log-file", str(out / "ncu.txt")]
    training = [python, "bench/training_step.py", "--out", str(out / "training_step.json")]
    imagenet = [python, "bench/imagenet_step.py", "--out", str(out / "imagenet_step.json")]
    methods = [python, "bench/normalization_cost.py", "--out", str(out / "normalization_cost.json")]
    if rehearse:  # without the tools of CUDA
        training += ["--batch", "2", "--width", "4", "--seconds", "0.1"]
        imagenet += ["--presets", "bsn", "--width", "0.01", "--image-size", "32", "--rounds", "1"]
        methods += ["--methods", "sn", "--width", "0.02", "--batch-size", "4", "--n-dis", "1", "--rounds", "1"]
        sanitizer, ncu, weights = [], [], "two weights"
        on_the_gpu = ["tests/test_op_errors.py", "-k", "gradients"]
        on_its_machine, bench = (
            ["tests/test_op_errors.py"],
            [*bench, "-k", "small and evaluation and whole or 16-fastsn"],
        )
    return {
        1: [
            *prepare,
            Step("tests on the GPU", 150, [*workers, *on_the_gpu], device),
            Step("device times", None, [*times, "--out", str(out / "device_times.json")]),
            Step("waits of training", 35, [*workers, "tests/test_training_step_waits.py", "tests/test_cuda_graph.py"]),
            Step("stress", 60, [*stress, "2", "--weights", weights] if rehearse else [*stress, "3000"]),
            Step("ncu", 60, [*ncu, *times, "--once"]),
        ],
        2: [
            *prepare,
            Step("training steps", 130, training),
            Step("a step by every method", 60, methods),
            Step("training share", 60, [python, "bench/training_share.py", "--out", str(out / "training_share.json")]),
            Step(
                "contestants",
                None,
                [*pytest, *quiet, "--benchmark-only", f"--benchmark-json={raw}", *bench],
            ),
            Step("report", 20, [python, "bench/report.py", raw, suite]),
        ],
        3: [
            *prepare,
            Step("a step of ImageNet", 150, imagenet),
            # An allocation of its own for every tensor: what lies past the end of one is then nobody's.
            Step(
                "sanitizer",
                110,
                [*sanitizer, *stress, "1", "--weights", weights],
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            ),
            Step(
                "tests on its machine",
                None,
                [*workers, *on_its_machine],
                {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},  # the interpreter's tensors are the CPU's
            ),
        ],
    }


def _can_be_interrupted() -> None:
    """What a shell starts in the background ignores SIGINT, and so would everything that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(step: Step, log: IO[str], seconds: float) -> str:
    """How it ended, its output in the log."""
    if shutil.which(step.command[0]) is None:
        return f"FAILED, {step.command[0]} is not here"
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
    process = subprocess.Popen(
        step.command,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | step.environment,
        start_new_session=True,
        preexec_fn=_can_be_interrupted,
    )
    try:
        code = process.wait(seconds)
        return f"FAILED with {code}" if code else "passed"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return "passed, in the time it had," if process.returncode == 0 else "OUT OF TIME"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        process.wait()


def run_part(number: int, steps: list[Step], out: Path, limit: float = LIMIT) -> bool:
    """Whether all went well, in so many seconds. Prints the end of what every step has to say."""
    begin, well = time.monotonic(), True
    with (out / f"gpu-{number}.log").open("w+") as log:
        for i, step in enumerate(steps):
            print(f"== {step.name}: {' '.join(step.command)[:200]}", file=log, flush=True)
            here, start = log.seek(0, os.SEEK_END), time.monotonic()
            left = limit - GRACE - (start - begin)
            seconds = left - sum(x.seconds or 0 for x in steps[i + 1 :]) if step.seconds is None else step.seconds
            said = run(step, log, max(min(seconds, left), 1))
            log.seek(here)
            lines = log.read().splitlines()
            print(f"== part {number}, {step.name}: {said} in {time.monotonic() - start:.0f} s", file=log, flush=True)
            print(f"== part {number}, {step.name}: {said} in {time.monotonic() - start:.0f} s")
            print(*(line[:160] for line in lines[-15 if said.startswith("passed") else -40 :]), sep="\n", flush=True)
            well &= said.startswith("passed")
            if step.name == "versions" and not well:
                break
    return well


def main() -> None:
    """Every part that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=int, nargs="+", choices=(1, 2, 3))
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of each part")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    steps = parts(out, arguments.rehearse)
    sys.exit(False in [run_part(number, steps[number], out, arguments.limit) for number in arguments.parts])


if __name__ == "__main__":
    main()
