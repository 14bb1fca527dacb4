"""Everything there is to know of a GPU, in three parts of nine minutes at most. Nothing is installed.

python .ci/gpu.py 1      # does it work: all tests that a GPU can run, races and compute-sanitizer beside them; what a
                         # training step takes
python .ci/gpu.py 2      # how fast: device time of every kernel, whole steps of training, the contestants
python .ci/gpu.py 3      # ncu, every launch setting, the tests on the CPU of its machine
python .ci/gpu.py 1 2 3 --rehearse      # without a GPU, in Triton's interpreter: a little of each, to see that it runs

Seconds, at most, in this order, which is that of what is worth knowing first: a part with a smaller --limit leaves out
the last.

1    versions 40, build 90, tests of training 90, tests on the GPU what is left (an H200 and 16 cores took 180 for 1,700
     with 15 workers and the two steps beside them), training steps 130
2    versions 40, build 90, device times 60, training share 50, a step of ImageNet 100, a step by every method 60,
     contestants what is left, report 20
3    versions 40, build 90, ncu 60, device times of every setting 120, tests on its machine what is left

With 15 minutes of a machine: part 1, then part 2 with --limit 330 on the same machine.

A part leaves one log of its steps, one of each that runs beside others, and what they have measured, in --out. A step
that fails does not keep the others from running, and one whose time is over is interrupted: pytest and the scripts then
write what they have. Tests are named in the log as they end, and those that have failed are printed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).parent.parent
LIMIT = 540  # seconds of a part
FAILURES = 30  # tests that are named in what is printed
GRACE = 15  # seconds in which a step that is interrupted may write its results
ON_THE_GPU = ["triton", "gpu", "op_errors", "ops", "layers", "step", "fuse", "recomputation", "state_safety"]
ON_THE_GPU += ["gradients", "parity_with_torch", "plan", "plan_lifetimes", "threads", "recompute"]
ON_THE_GPU += ["changed_weights", "stacked_norms"]
OF_TRAINING = ["tests/test_cuda_graph.py", "tests/test_training_step_waits.py"]
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
    beside: bool = False  # runs while the next step does that is not, and ends with it


def parts(out: Path, rehearse: bool) -> dict[int, list[Step]]:
    """The steps of every part. A part may be the first that a machine sees."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    count = min(os.cpu_count() or 1, 2 if rehearse else 15)
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
            # Their default device is the CPU, unlike that of the others.
            Step("tests of training", 90, [*workers, *OF_TRAINING], {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}),
            Step("stress", 0, [*stress, "2", "--weights", weights] if rehearse else [*stress, "1000"], beside=True),
            # An allocation of its own for every tensor: what lies past the end of one is then nobody's.
            Step(
                "sanitizer",
                0,
                [*sanitizer, *stress, "1", "--weights", weights],
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                beside=True,
            ),
            Step("tests on the GPU", None, [*workers, *on_the_gpu], device),
            Step("training steps", 130, training),
        ],
        2: [
            *prepare,
            Step("device times", 60, [*times, "--out", str(out / "device_times.json")]),
            Step("training share", 50, [python, "bench/training_share.py", "--out", str(out / "training_share.json")]),
            Step("a step of ImageNet", 100, imagenet),
            Step("a step by every method", 60, methods),
            Step(
                "contestants",
                None,
                [*pytest, *quiet, "--benchmark-only", f"--benchmark-json={raw}", *bench],
            ),
            Step("report", 20, [python, "bench/report.py", raw, suite]),
        ],
        3: [
            *prepare,
            Step("ncu", 60, [*ncu, *times, "--once"]),
            Step("device times of every setting", 120, [*times, "--out", str(out / "device_times_of_settings.json")]),
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
    return end(step, start(step, log), seconds)


def start(step: Step, log: IO[str]) -> subprocess.Popen[bytes] | None:
    """None: what is to be run is not here."""
    if shutil.which(step.command[0]) is None:
        return None
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
    return subprocess.Popen(
        step.command,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | step.environment,
        start_new_session=True,
        preexec_fn=_can_be_interrupted,
    )


def end(step: Step, process: subprocess.Popen[bytes] | None, seconds: float) -> str:
    """How it ended, in so many seconds from now."""
    if process is None:
        return f"FAILED, {step.command[0]} is not here"
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
    beside: list[tuple[Step, subprocess.Popen[bytes] | None, IO[str], float]] = []
    with (out / f"gpu-{number}.log").open("w+") as log, ExitStack() as logs:
        for i, step in enumerate(steps):
            since = time.monotonic()
            if step.beside:
                own = logs.enter_context((out / f"gpu-{number}-{step.name}.log").open("w+"))
                beside.append((step, start(step, own), own, since))
                continue
            print(f"== {step.name}: {' '.join(step.command)[:200]}", file=log, flush=True)
            here = log.seek(0, os.SEEK_END)
            left = limit - GRACE - (since - begin)
            seconds = left - sum(x.seconds or 0 for x in steps[i + 1 :]) if step.seconds is None else step.seconds
            said = run(step, log, max(min(seconds, left), 1))
            well &= _report(f"part {number}, {step.name}", said, log, here, since)
            for other, process, own, then in beside:
                well &= _report(f"part {number}, {other.name}", end(other, process, 1), own, 0, then)
            beside = []
            if step.name == "versions" and not well:
                break
    return well


def _report(name: str, said: str, log: IO[str], here: int, since: float) -> bool:
    """Print how a step has ended, here and in its log, with the end of what it says there. Whether it ended well."""
    log.seek(here)
    lines = log.read().splitlines()
    ended = f"== {name}: {said} in {time.monotonic() - since:.0f} s"
    print(ended, file=log, flush=True)
    well = said.startswith("passed")
    shown = 15 if well else 40
    failed = [line for line in lines[:-shown] if "] FAILED " in line][:FAILURES]
    print(ended, *(line[:160] for line in [*failed, *lines[-shown:]]), sep="\n", flush=True)
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
