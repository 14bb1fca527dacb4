"""sbatch, srun, sacct, scontrol and squeue in a few lines, each by the name it is called by: jobs are processes of this
machine, and FAKE_SLURM is the folder in which they are written down."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

NAMES = ("sbatch", "srun", "sacct", "scontrol")


def install(folder: Path) -> dict[str, str]:
    """Into ``folder``; the environment in which they are found."""
    (folder / "bin").mkdir(parents=True)
    (folder / "jobs").mkdir()
    for name in NAMES:
        file = folder / "bin" / name
        file.write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__).resolve()} {name} "$@"\n')
        file.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM": str(folder / "jobs")}


def sbatch(script: str) -> None:
    jobs = Path(os.environ["FAKE_SLURM"])
    number = 4711 + len(list(jobs.glob("*.sh")))
    text = Path(script).read_text()
    (jobs / f"{number}.sh").write_text(text)
    array = re.search(r"--array=0-(\d+)", text)
    for task in range(int(array[1]) + 1) if array else [None]:
        start(number, task)
    print(f"Submitted batch job {number}")


def start(number: int, task: int | None) -> None:
    jobs = Path(os.environ["FAKE_SLURM"])
    name = str(number) if task is None else f"{number}_{task}"
    own = {"SLURM_JOB_ID": name, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_NUM_NODES": "1"}
    if task is not None:
        own |= {"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(task)}
    with open(jobs / f"{name}.out", "ab") as out:
        process = subprocess.Popen(
            ["bash", str(jobs / f"{number}.sh")],
            env={**os.environ, **own},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    with open(jobs / f"{name}.pids", "a") as pids:
        pids.write(f"{process.pid}\n")
    process.returncode = 0  # nobody waits for it


def srun(*arguments: str) -> None:
    command = list(arguments)
    while command[0].startswith("-"):
        valued = command[0] in ("--output", "--error")
        command = command[2 if valued else 1 :]
    os.execvp(command[0], command)


def sacct(*_: str) -> None:
    print("JobID|State|NodeList")
    for file in sorted(Path(os.environ["FAKE_SLURM"]).glob("*.pids")):
        pid = int(file.read_text().split()[-1])
        print(f"{file.stem}|{'RUNNING' if is_alive(pid) else 'COMPLETED'}|here")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def scontrol(what: str, name: str) -> None:
    assert what == "requeue"
    with open(Path(os.environ["FAKE_SLURM"]) / "requeued", "a") as file:
        file.write(json.dumps(name) + "\n")
    number, _, task = name.partition("_")
    start(int(number), int(task) if task else None)


if __name__ == "__main__":
    {"sbatch": sbatch, "srun": srun, "sacct": sacct, "scontrol": scontrol}[sys.argv[1]](*sys.argv[2:])
