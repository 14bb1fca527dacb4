"""From archives in the real formats to data folders: pixels, broken input, interruptions."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import prepare
import real_archives as real
from gan.data import pixels, store
from gan.data.store import memory_store, open_store

RNG = np.random.default_rng(0)
CIFAR = RNG.integers(0, 256, (20, 3072), dtype=np.uint8)
CIFAR_LABELS = [int(x) for x in RNG.integers(0, 10, 20)]
STL = RNG.integers(0, 256, 7 * 3 * 96 * 96, dtype=np.uint8).tobytes()
CELEBA = real.celeba_members(RNG, 6)
PART = {"cifar10": ["--no-checksum", "--expect", "20"], "stl10": ["--no-checksum", "--expect", "7"]}
PART |= {"celeba": ["--no-checksum", "--expect", "6", "--workers", "1"], "folder": ["--size", "16", "--workers", "1"]}
ALONE = Path(__file__).parent.parent / "train/prepare.py"


def run(*args: str | Path) -> None:
    prepare.main([str(arg) for arg in args])


def images(folder: Path) -> np.ndarray:
    found = open_store(folder)
    return found.read(np.arange(found.count))


def refusal(*args: str | Path) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        run(*args)
    message = str(ended.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def cifar10(folder: Path, members: dict[str, bytes] | None = None) -> Path:
    return real.tar(folder / "cifar.tar.gz", members or real.cifar_members(CIFAR, CIFAR_LABELS))


def stl10(folder: Path, content: bytes = STL) -> Path:
    members = {"stl10_binary/train_X.bin": b"x" * 1000, "stl10_binary/unlabeled_X.bin": content}
    return real.tar(folder / "stl.tar.gz", members)


def celeba(folder: Path, members: dict[str, bytes] | None = None) -> Path:
    return real.zipped(folder / "celeba.zip", members or CELEBA)


def pictures(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


ARCHIVES = {"cifar10": cifar10, "stl10": stl10, "celeba": celeba}


def test_cifar10_has_the_authors_pixels_and_the_labels_in_the_order_of_the_batches(tmp_path):
    run("cifar10", cifar10(tmp_path), "--out", tmp_path / "data", *PART["cifar10"])
    assert np.array_equal(images(tmp_path / "data"), real.authors_cifar10(CIFAR))
    found = open_store(tmp_path / "data")
    assert found.labels.tolist() == CIFAR_LABELS
    assert (found.name, found.classes, found.image_size, found.channels) == ("cifar10", 10, 32, 3)


@pytest.mark.parametrize("chunk", [512, 2])
def test_stl10_has_the_authors_pixels(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(store, "CHUNK", chunk)
    run("stl10", stl10(tmp_path), "--out", tmp_path / "data", *PART["stl10"])
    assert np.array_equal(images(tmp_path / "data"), real.authors_stl10(STL))
    assert open_store(tmp_path / "data").labels is None


@pytest.mark.parametrize("folder", ["img_align_celeba", "celeba/img_align_celeba", ""])
def test_celeba_has_the_authors_pixels_in_whatever_folder_it_is(tmp_path, folder):
    members = {str(Path(folder, Path(name).name)): content for name, content in CELEBA.items()}
    members = {"__MACOSX/._000001.jpg": b"no picture", **dict(reversed(members.items()))}
    run("celeba", celeba(tmp_path, members), "--out", tmp_path / "data", *PART["celeba"])
    assert np.array_equal(images(tmp_path / "data"), np.stack([real.authors_celeba(x) for x in CELEBA.values()]))


def odd_pictures() -> dict[str, bytes]:
    """Everything that is not a JPEG in RGB, upright, of eight bits."""
    photo = real.picture(RNG, 200, 190)
    rgba = np.dstack([photo, RNG.integers(0, 256, photo.shape[:2], dtype=np.uint8)])
    found = {f"{kind} turned {i}": real.turned(photo, i, kind) for kind in ("JPEG", "PNG") for i in range(1, 9)}
    found |= {
        "PNG named .jpg": real.encoded(photo, "PNG"),
        "CMYK": real.encoded(Image.fromarray(rgba, "RGBA").convert("RGB").convert("CMYK"), quality=95),
        "CMYK with black": real.encoded(Image.frombytes("CMYK", (190, 200), rgba.tobytes()), quality=95),
        "grey": real.encoded(Image.fromarray(photo[..., 0])),
        "progressive": real.encoded(photo, progressive=True, quality=60),
        "all chroma": real.encoded(photo, subsampling=0),
        "transparent": real.encoded(rgba, "PNG"),
        "grey and transparent": real.encoded(Image.fromarray(rgba).convert("LA"), "PNG"),
        "palette": real.encoded(Image.fromarray(photo).quantize(32), "PNG"),
        "one bit": real.encoded(Image.fromarray(photo[..., 0]).convert("1"), "PNG"),
        "16 bits": real.encoded(RNG.integers(0, 65536, (200, 190), dtype=np.uint16), "PNG"),
    }
    return found


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("name", "content"), [pytest.param(*x, id=x[0]) for x in odd_pictures().items()])
def test_a_picture_of_any_kind_is_what_opencv_makes_of_it(name, content):
    expected = cv2.cvtColor(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    assert np.array_equal(pixels.decode(content), expected), name


@pytest.mark.parametrize("size", [2, 6, 64, 96, 128, 250])
def test_halving_is_opencvs_linear_resize(size):
    image = RNG.integers(0, 256, (size, size, 3), dtype=np.uint8)
    assert np.array_equal(pixels.halve(image), cv2.resize(image, (size // 2, size // 2)).reshape(size // 2, -1, 3))


def antialiased(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear by torch, which shares no code with Pillow."""
    x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].double()
    y = torch.nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return y[0].permute(1, 2, 0).numpy()


def test_mimicrys_pixels_are_antialiased(tmp_path):
    run("stl10", stl10(tmp_path), "--out", tmp_path / "stl", *PART["stl10"], "--preset", "mimicry")
    run("celeba", celeba(tmp_path), "--out", tmp_path / "celeba", *PART["celeba"], "--preset", "mimicry")
    uncut = np.frombuffer(STL, np.uint8).reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    expected = np.stack([antialiased(x, 48) for x in uncut])
    assert np.abs(images(tmp_path / "stl") - expected).max() <= 1  # Pillow rounds between the two passes
    faces = [np.asarray(Image.open(io.BytesIO(content)))[20:198] for content in CELEBA.values()]
    assert np.abs(images(tmp_path / "celeba") - np.stack([antialiased(x, 64) for x in faces])).max() <= 1
    assert json.loads((tmp_path / "celeba/meta.json").read_text())["preset"] == "mimicry"


def test_class_folders_become_labels(tmp_path):
    photo = real.picture(RNG, 40, 60)
    wide = {"b/2.png": real.encoded(photo, "PNG"), "a/deep/1.jpg": real.encoded(photo[:, :40]), "b/.x.png": b"hidden"}
    run("folder", pictures(tmp_path / "in", {**wide, "a/notes.txt": b""}), "--out", tmp_path / "data", *PART["folder"])
    found = open_store(tmp_path / "data")
    assert (found.count, found.classes, found.labels.tolist()) == (2, 2, [0, 1])
    expected = Image.fromarray(photo[:, 10:50]).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(found.read(np.array([1]))[0], np.asarray(expected))
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    assert meta["classes"] == ["a", "b"]
    assert "LANCZOS" in meta["pixels"]


def test_what_is_transparent_in_a_folder_lies_on_white(tmp_path):
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:8, :, 3], rgba[:4, :, 0], rgba[8, :, 3] = 255, 255, 51
    run(
        "folder",
        pictures(tmp_path / "in", {"x.png": real.encoded(rgba, "PNG")}),
        "--out",
        tmp_path / "data",
        *PART["folder"],
    )
    rows = images(tmp_path / "data")[0, :, 0].tolist()
    assert rows == [[255, 0, 0]] * 4 + [[0, 0, 0]] * 4 + [[204, 204, 204]] + [[255, 255, 255]] * 7


def test_an_array_of_the_authors_is_taken_as_it_is(tmp_path):
    array = RNG.integers(0, 256, (9, 48, 48, 3), dtype=np.uint8)
    np.save(tmp_path / "stl10.npy", array)
    run("npy", tmp_path / "stl10.npy", "--out", tmp_path / "data")
    assert np.array_equal(images(tmp_path / "data"), array)
    assert open_store(tmp_path / "data").key == memory_store("stl10", array).key


def test_several_processes_write_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 2)
    for workers in ("1", "2"):
        run("celeba", celeba(tmp_path), "--out", tmp_path / workers, *PART["celeba"][:3], "--workers", workers)
    for file in ("images.npy", "meta.json"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_meta_json_says_what_it_was_made_from(tmp_path, monkeypatch):
    import hashlib

    from gan.data.archives import Cifar10

    archive = cifar10(tmp_path)
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(Cifar10, "md5", md5)
    run("cifar10", archive, "--out", tmp_path / "data", "--expect", "20")
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    wanted = {"name": "cifar10", "source": "cifar.tar.gz", "bytes": archive.stat().st_size, "md5": md5}
    wanted |= {"preset": "bsn", "count": 20, "image_size": 32, "channels": 3, "key": open_store(tmp_path / "data").key}
    assert wanted.items() <= meta.items()
    assert meta["versions"]["numpy"] == np.__version__
    assert str(tmp_path) not in json.dumps(meta)


# Broken input


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_with_another_md5_is_refused(tmp_path, name):
    said = refusal(name, ARCHIVES[name](tmp_path), "--out", tmp_path / "data")
    assert "md5" in said
    assert "--no-checksum" in said
    assert not list(tmp_path.glob("data*"))


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_is_cut_off_is_refused(tmp_path, name):
    archive = ARCHIVES[name](tmp_path)
    whole = archive.read_bytes()
    for size in (0, 7, len(whole) // 2, len(whole) * 3 // 4):
        archive.write_bytes(whole[:size])
        assert archive.name in refusal(name, archive, "--out", tmp_path / "data", *PART[name])
        assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_foreign_file_is_refused(tmp_path, name):
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"GIF89a, or something like it" * 1000)
    assert "foreign" in refusal(name, foreign, "--out", tmp_path / "data", *PART[name])
    other = celeba(tmp_path) if name != "celeba" else cifar10(tmp_path)
    assert other.name in refusal(name, other, "--out", tmp_path / "data", *PART[name])
    assert "got" in refusal(name, tmp_path / "absent", "--out", tmp_path / "data", *PART[name])


@pytest.mark.parametrize(("name", "count"), [("cifar10", 20), ("stl10", 7), ("celeba", 6)])
@pytest.mark.parametrize("off", [-1, 1])
def test_another_number_of_images_than_expected_is_refused(tmp_path, name, count, off):
    args = ["--no-checksum", "--expect", str(count + off)]
    said = refusal(name, ARCHIVES[name](tmp_path), "--out", tmp_path / "data", *args)
    assert f"got {count}" in said
    assert f"{count + off}" in said


def test_a_missing_member_is_named(tmp_path):
    members = real.cifar_members(CIFAR, CIFAR_LABELS)
    del members["cifar-10-batches-py/data_batch_3"]
    said = refusal("cifar10", cifar10(tmp_path, members), "--out", tmp_path / "data", *PART["cifar10"])
    assert "data_batch_3" in said
    faces = {name: content for name, content in CELEBA.items() if "000004" not in name}
    said = refusal("celeba", celeba(tmp_path, faces), "--out", tmp_path / "data", *PART["celeba"])
    assert "000004.jpg is missing" in said


@pytest.mark.parametrize("damage", ["no picture", "cut off", "too small", "flipped in the zip", "text"])
def test_a_broken_member_is_named(tmp_path, monkeypatch, damage):
    workers = "2" if damage == "cut off" else "1"  # processes take a while to start: once is enough
    monkeypatch.setattr(store, "CHUNK", 3)
    name = "img_align_celeba/000005.jpg"
    content = CELEBA[name]
    broken = {
        "no picture": b"",
        "cut off": content[: len(content) // 2],
        "too small": real.encoded(real.picture(RNG, 100, 178)),
        "text": b"404 not found" * 99,
    }
    archive = celeba(tmp_path, {**CELEBA, name: broken.get(damage, content)})
    if damage == "flipped in the zip":
        whole = bytearray(archive.read_bytes())
        whole[whole.index(content) + len(content) // 2] ^= 255
        archive.write_bytes(whole)
    args = ["--no-checksum", "--expect", "6", "--workers", workers]
    said = refusal("celeba", archive, "--out", tmp_path / "data", *args)
    assert name in said
    assert archive.name in said
    assert not (tmp_path / "data").exists()


class Asks:
    """A pickle that runs something when it is read."""

    def __reduce__(self):
        return os.mkdir, ("/tmp/this-must-not-be-made",)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (pickle.dumps({"data": Asks()}, 2), "mkdir"),
        (pickle.dumps(["no", "dict"], 2), "dict"),
        (real.cifar_pickle(CIFAR[:4, :100], [1, 2, 3, 4]), "3072"),
        (real.cifar_pickle(CIFAR[:4], [1, 2, 3]), "labels"),
        (real.cifar_pickle(CIFAR[:4], [1, 2, 3, 10]), "labels"),
        (real.cifar_pickle(CIFAR[:4], [1, 2, 3, 4])[:-500], "data_batch_2"),
        (b"not a pickle", "data_batch_2"),
    ],
    ids=["code", "no dict", "other width", "too few labels", "label 10", "cut off", "no pickle"],
)
def test_a_pickle_that_is_not_cifars_is_refused_unread(tmp_path, content, why):
    members = real.cifar_members(CIFAR, CIFAR_LABELS) | {"cifar-10-batches-py/data_batch_2": content}
    said = refusal("cifar10", cifar10(tmp_path, members), "--out", tmp_path / "data", *PART["cifar10"])
    assert "data_batch_2" in said
    assert why in said
    assert not Path("/tmp/this-must-not-be-made").exists()


def test_stl10_with_part_of_an_image_is_refused(tmp_path):
    assert "27648" in refusal("stl10", stl10(tmp_path, STL[:-1]), "--out", tmp_path / "data", *PART["stl10"])


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "got none"),
        ({"a.png": b"x", "b/c.png": b"x"}, "a.png beside b/"),
        ({"b/c.png": b"x"}, "b/c.png is broken"),
    ],
)
def test_a_folder_that_is_no_set_is_refused(tmp_path, files, why):
    (tmp_path / "in").mkdir()
    assert why in refusal("folder", pictures(tmp_path / "in", files), "--out", tmp_path / "data", *PART["folder"])


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "float32"),
        (np.zeros((2, 8, 9, 3), np.uint8), "(2, 8, 9, 3)"),
        (np.zeros((2, 3, 8, 8), np.uint8), "(2, 3, 8, 8)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "(0, 8, 8, 3)"),
        (np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)), "columns"),
    ],
)
def test_an_array_of_another_kind_is_refused(tmp_path, array, why):
    np.save(tmp_path / "x.npy", array)
    assert why in refusal("npy", tmp_path / "x.npy", "--out", tmp_path / "data")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["stl10", "x", "--preset", "chainer"], "preset: expected bsn or mimicry for stl10, got chainer"),
        (["celeba", "x", "--preset", "BSN"], "preset: expected bsn or mimicry for celeba, got BSN"),
        (["folder", "x", "--size", "0"], "size: expected at least 1 pixel, got 0"),
        (["folder", "x", "--size", "8"], "expected a folder of images, got x"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, args, why):
    assert why in refusal(*args, "--out", tmp_path / "data")


# Interruptions

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
    paths = os.pathsep.join([str(ALONE.parent), os.environ.get("PYTHONPATH", "")])
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
    command = [sys.executable, ALONE, "celeba", archive, "--out", tmp_path / "data", *args]
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
        patched.setattr("gan.data.writer._sync", _stops)
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

    command = [sys.executable, ALONE, "stl10", stl10(tmp_path), "--out", tmp_path / "data", *PART["stl10"]]
    done = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert "images.npy" in done.stderr
