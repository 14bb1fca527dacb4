"""From archives in the real formats to data folders: the pixels, the labels and meta.json."""

from __future__ import annotations

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import real_archives as real
from gan.data import pixels, store
from gan.data.store import memory_store, open_store
from prepare_runs import (
    CELEBA,
    CIFAR,
    CIFAR_LABELS,
    PART,
    STL,
    antialiased,
    celeba,
    cifar10,
    images,
    pictures,
    run,
    stl10,
)

RNG = np.random.default_rng(1)


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
