"""train/prepare.py killed, run twice, or out of room on the disk: nothing is spoiled, and it continues where it was."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import real_archives as real
from gan.data import store
from prepare_runs import CELEBA, PART, STL, celeba, images, pictures, refusal, run, stl10

RNG = np.random.default_rng(2)
PREPARE = Path(__file__).parent.parent / "train/prepare.py"

KILLED_EVERYWHERE = """
import os, shutil, signal, sys
from pathlib import Path
import prepare
from gan.data import store

def prepared(killed_at):
    child = os.fork()
    if child == 0:
        left = [killed_at]
        def counted(call):
            def wrapped(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            return wrapped
        for name in ("fsync", "fdatasync", "pwrite", "posix_fallocate", "ftruncate", "rename", "mkdir", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        prepare.main(sys.argv[1:])
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def content():
    return {path.name: path.read_bytes() for path in out.iterdir()}

store.CHUNK = 2
out = Path(sys.argv[sys.argv.index("--out") + 1])
assert prepared(0) == 0
whole, kills = content(), 0
while True:
    shutil.rmtree(out)
    ended = prepared(kills + 1)
    if ended == 0:
        break
    assert ended == -signal.SIGKILL, ended
    kills += 1
    if out.exists():
        left = {name: data for name, data in content().items() if name in whole}
        assert left == whole, (kills, "looks whole, but is not")
    assert prepared(0) == 0
    assert content() == whole, (kills, "continued to something else")
    assert not list(out.parent.glob("*.partial"))
print(kills)
"""


def test_a_kill_before_any_call_of_the_system_loses_and_spoils_nothing(tmp_path):
    files = {f"{i % 2}/{i}.png": real.encoded(real.picture(RNG, 16, 16), "PNG") for i in range(3)}
    args = ["folder", pictures(tmp_path / "in", files), "--out", tmp_path / "data", *PART["folder"]]
    paths = os.pathsep.join([str(PREPARE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLED_EVERYWHERE, *args],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 15


def test_a_killed_command_continues_where_it_was_and_leaves_no_process_behind(tmp_path):
    members = real.celeba_members(RNG, 3000)
    archive = celeba(tmp_path, members)
    args = ["--no-checksum", "--expect", "3000", "--workers", "2"]
    command = [sys.executable, PREPARE, "celeba", archive, "--out", tmp_path / "data", *args]
    digests = tmp_path / "data.partial/digests"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not digests.exists() or not any(digests.read_bytes()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    assert not (tmp_path / "data").exists()
    there = sum(512 * any(digests.read_bytes()[i : i + 16]) for i in range(0, 6 * 16, 16))
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert f"{there} of 3000 images are there" in done.stderr
    last = list(members.values())[-8:]
    assert np.array_equal(images(tmp_path / "data")[-8:], np.stack([real.authors_celeba(x) for x in last]))
    assert not [pid for pid in children if _runs(pid)]


def _runs(pid: str) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except OSError:
        return False


def test_another_archive_does_not_continue_what_a_killed_command_left(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 2)
    faces = {**CELEBA, "img_align_celeba/000005.jpg": b"broken"}
    refusal("celeba", celeba(tmp_path, faces), "--out", tmp_path / "data", *PART["celeba"])
    assert any((tmp_path / "data.partial/digests").read_bytes())
    turned = dict(zip(CELEBA, reversed(CELEBA.values()), strict=True))
    run("celeba", celeba(tmp_path, turned), "--out", tmp_path / "data", *PART["celeba"])
    assert np.array_equal(images(tmp_path / "data"), np.stack([real.authors_celeba(x) for x in turned.values()]))


def test_chunks_without_their_images_are_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 2)
    archive = stl10(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("gan.data.writer.sync_folder", _stops)
        refusal("stl10", archive, "--out", tmp_path / "data", *PART["stl10"])
    (tmp_path / "data.partial/images.npy").unlink()
    run("stl10", archive, "--out", tmp_path / "data", *PART["stl10"])
    assert np.array_equal(images(tmp_path / "data"), real.authors_stl10(STL))


def _stops(_: Path) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_a_set_that_is_there_is_left_alone_and_another_one_is_not_written_over_it(tmp_path):
    archive, out = celeba(tmp_path), tmp_path / "data"
    run("celeba", archive, "--out", out, *PART["celeba"])
    before = (out / "images.npy").stat()
    run("celeba", archive, "--out", out, *PART["celeba"])
    said = refusal("celeba", archive, "--out", out, *PART["celeba"], "--preset", "mimicry")
    assert "preset is bsn, not mimicry" in said
    assert (out / "images.npy").stat().st_mtime_ns == before.st_mtime_ns
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    assert "new folder" in refusal("celeba", archive, "--out", tmp_path / "mine", *PART["celeba"])


def test_two_commands_at_once_do_not_write_the_same_folder(tmp_path):
    import fcntl

    (tmp_path / "data.partial").mkdir()
    with (tmp_path / "data.partial/plan.json").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process" in refusal("stl10", stl10(tmp_path), "--out", tmp_path / "data", *PART["stl10"])


def test_a_full_disk_is_one_line_before_anything_is_decoded(tmp_path, monkeypatch):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    archive = stl10(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        said = refusal("stl10", archive, "--out", tmp_path / "data", *PART["stl10"])
    assert "No space left on device (the images take 0.00 GB)" in said
    assert "images.npy" in said
    run("stl10", archive, "--out", tmp_path / "data", *PART["stl10"])
    assert np.array_equal(images(tmp_path / "data"), real.authors_stl10(STL))


def test_a_limit_on_the_size_of_files_is_one_line(tmp_path):
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, PREPARE, "stl10", stl10(tmp_path), "--out", tmp_path / "data", *PART["stl10"]]
    done = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert "images.npy" in done.stderr
