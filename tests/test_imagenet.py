"""ILSVRC2012_img_train.tar: which image is where, its pixels by each preset, archives that are not whole."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import real_archives as real
from gan.data import pixels, store
from gan.data.imagenet import ImageNet
from gan.data.store import open_store
from prepare_runs import IMAGENET, PART, antialiased, imagenet, images, refusal, run

RNG = np.random.default_rng(5)
WNIDS = ("n01440764", "n02084071")
IN_ORDER = [IMAGENET[wnid][number] for wnid in WNIDS for number in sorted(IMAGENET[wnid])]
PICTURES = [f"{wnid}.tar/{wnid}_{number}.JPEG" for wnid in WNIDS for number in sorted(IMAGENET[wnid])]


def prepared(folder: Path, *args: str) -> Path:
    run("imagenet", imagenet(folder), "--out", folder / "data", *PART["imagenet"], *args)
    return folder / "data"


def test_pixels_are_the_authors_and_labels_the_sorted_classes(tmp_path):
    data = prepared(tmp_path)
    for picture, found, content in zip(PICTURES, images(data), IN_ORDER, strict=True):
        assert np.array_equal(found, real.authors_imagenet(content)), picture
    opened = open_store(data)
    assert opened.labels.tolist() == [0] * 9 + [1] * 9
    assert (opened.name, opened.classes, opened.image_size) == ("imagenet", 2, 128)
    assert json.loads((data / "meta.json").read_text())["classes"] == list(WNIDS)


def test_another_size_is_opencvs_too(tmp_path):
    data = prepared(tmp_path, "--size", "64")
    assert np.array_equal(images(data), np.stack([real.authors_imagenet(x, 64) for x in IN_ORDER]))


def test_linear_is_opencvs_resize_of_any_square():
    for old in [*range(1, 300, 9), 64, 128, 255, 256, 257, 375, 500, 1199, 2848]:
        image = RNG.integers(0, 256, (old, old + 2, 3), dtype=np.uint8)[:, 1:-1]  # a crop: its rows lie apart
        for new in (128, 64, int(RNG.integers(1, 200))):
            assert np.array_equal(pixels.linear(image, new), cv2.resize(image, (new, new))), (old, new)


def test_several_processes_write_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 5)
    archive = imagenet(tmp_path)
    for workers in ("1", "2"):
        args = [*PART["imagenet"][:-1], workers, "--preset", "chainer", "--size", "16"]
        run("imagenet", archive, "--out", tmp_path / workers, *args)
    for file in ("images.npy", "labels.npy", "meta.json"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_an_interrupted_command_continues_with_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 5)
    made: list[int] = []

    def stopping(
        self: ImageNet, first: int, last: int, whole: Callable[..., np.ndarray] = ImageNet.images
    ) -> np.ndarray:
        made.append(first)
        if len(made) == 3:
            raise KeyboardInterrupt
        return whole(self, first, last)

    monkeypatch.setattr(ImageNet, "images", stopping)
    args = [imagenet(tmp_path), "--out", tmp_path / "data", *PART["imagenet"]]
    with pytest.raises(SystemExit, match="interrupted: the same command continues"):
        run("imagenet", *args)
    assert not (tmp_path / "data").exists()
    run("imagenet", *args)
    assert made == [0, 5, 10, 10, 15]
    assert np.array_equal(images(tmp_path / "data"), np.stack([real.authors_imagenet(x) for x in IN_ORDER]))


def of_256(content: bytes) -> bool:
    with Image.open(io.BytesIO(content)) as picture:
        return min(picture.size) >= 256


def by_chainer(content: bytes) -> np.ndarray:
    """The JPEG by OpenCV, scipy's and Pillow's part in floats."""
    with Image.open(io.BytesIO(content)) as picture:
        halved = picture.format == "JPEG" and len(picture.layer) > 1 and picture.layer[0][1:3] == (2, 2)
        sampling = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420 if halved else cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
        width, height = (round(side * 256 / min(picture.size)) for side in picture.size)
        x = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
    top, left = (height - 256) // 2, (width - 256) // 2
    quality = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
    x = cv2.imdecode(cv2.imencode(".jpg", x[top : top + 256, left : left + 256, ::-1], quality)[1], 1)[..., ::-1]
    x = np.rint((x - float(x.min())) * (255 / (float(x.max()) - float(x.min()))))
    return antialiased(x, 128)


def test_chainer_drops_small_images_and_stretches_the_others_one_by_one(tmp_path):
    data = prepared(tmp_path, "--preset", "chainer")
    kept = [content for content in IN_ORDER if of_256(content)]
    meta = json.loads((data / "meta.json").read_text())
    assert (meta["count"], meta["dropped"]) == (len(kept), 18 - len(kept)) == (14, 4)
    assert open_store(data).labels.tolist() == [0] * 7 + [1] * 7
    for found, content in zip(images(data), kept, strict=True):
        assert np.abs(found - by_chainer(content)).max() <= 2  # bytes are rounded four times


def test_the_stretch_is_scipys(tmp_path):
    """Of a picture that JPEG keeps as it is: two halves of one grey each."""
    grey = np.full((256, 256, 3), 60, np.uint8)
    grey[:, 128:] = 180
    flat = np.full((256, 256, 3), 77, np.uint8)
    content = {"1": real.encoded(grey, "PNG"), "2": real.encoded(flat, "PNG")}
    args = ["--no-checksum", "--expect", "2", "--workers", "1", "--preset", "chainer"]
    run("imagenet", imagenet(tmp_path, {WNIDS[0]: content}), "--out", tmp_path / "data", *args)
    halves, black = images(tmp_path / "data")
    assert (halves[:, :60] == 0).all()
    assert (halves[:, 68:] == 255).all()
    assert (black == 0).all()


def test_mimicrys_images_are_cropped_or_framed_in_black(tmp_path):
    data = prepared(tmp_path, "--preset", "mimicry", "--size", "224")
    for found, content in zip(images(data), IN_ORDER, strict=True):
        with Image.open(io.BytesIO(content)) as picture:
            x = np.asarray(picture.convert("RGB"))
        missing = [max(0, 224 - side) for side in x.shape[:2]]
        x = np.pad(x, [*((m // 2, (m + 1) // 2) for m in missing), (0, 0)])
        top, left = (int(np.rint((side - 224) / 2)) for side in x.shape[:2])
        assert np.array_equal(found, x[top : top + 224, left : left + 224])


def test_mimicrys_images_are_antialiased(tmp_path):
    archive, args = imagenet(tmp_path), [*PART["imagenet"], "--preset", "mimicry"]
    for size in ("224", "100"):
        run("imagenet", archive, "--out", tmp_path / size, *args, "--size", size)
    expected = np.stack([antialiased(x, 100) for x in images(tmp_path / "224")])
    assert np.abs(images(tmp_path / "100") - expected).max() <= 1


@pytest.mark.parametrize("picture", [0, 8, 17])
@pytest.mark.parametrize("preset", ["bsn", "chainer", "mimicry"])
def test_a_broken_picture_is_named(tmp_path, picture, preset):
    member = PICTURES[picture]
    wnid, number = member[:9], member.split("_")[1].removesuffix(".JPEG")
    classes = {**IMAGENET, wnid: {**IMAGENET[wnid], number: b"404 not found" * 99}}
    said = refusal(
        "imagenet", imagenet(tmp_path, classes), "--out", tmp_path / "data", *PART["imagenet"], "--preset", preset
    )
    assert f"ilsvrc.tar: the member {member} is broken" in said
    assert not (tmp_path / "data").exists()


def outer(folder: Path) -> dict[str, bytes]:
    """The members of a good archive."""
    with tarfile.open(imagenet(folder)) as file:
        return {member.name: file.extractfile(member).read() for member in file}


def changed(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


def second_header(content: bytes) -> int:
    with tarfile.open(fileobj=io.BytesIO(content)) as file:
        return file.getmembers()[1].offset


FIRST = f"{WNIDS[0]}.tar"


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda x: x | {FIRST: b""}, f"the member {FIRST} is broken: "),
        (lambda x: x | {FIRST: changed(x[FIRST], 0)}, f"the member {FIRST} is broken: "),
        (lambda x: x | {FIRST: changed(x[FIRST], second_header(x[FIRST]))}, f"the member {FIRST} is broken: "),
        (lambda x: x | {FIRST: x[FIRST][:-10240]}, f"the member {FIRST} is broken: "),
        (lambda x: x | {FIRST: x[FIRST][:50_000]}, f"the member {FIRST} is broken: "),
        (lambda x: x | {FIRST: bytes(10240)}, f"expected pictures (*.JPEG) in {FIRST} of ilsvrc.tar, got none"),
        (lambda x: x | {f"again/{FIRST}": x[FIRST]}, f"ilsvrc.tar: expected one {FIRST}, got more"),
        (lambda x: {FIRST: x[FIRST]}, "expected 18 images in ilsvrc.tar, got 9"),
        (
            lambda _: {"n01440764/n01440764_10026.JPEG": b"x"},
            "expected tars of classes (n01440764.tar) in ilsvrc.tar, got none",
        ),
    ],
)
def test_an_archive_with_a_class_that_is_not_whole_is_refused(tmp_path, damage, why):
    members = damage(outer(tmp_path))
    said = refusal(
        "imagenet", real.tar(tmp_path / "ilsvrc.tar", members), "--out", tmp_path / "data", *PART["imagenet"]
    )
    assert why in said
    assert not (tmp_path / "data").exists()


def test_an_archive_without_all_classes_is_refused_before_it_is_indexed(tmp_path):
    empty = {f"n{i:08d}.tar": b"" for i in range(999)}
    said = refusal("imagenet", real.tar(tmp_path / "x.tar", empty), "--out", tmp_path / "data", "--no-checksum")
    assert "expect: expected 1000 tars of classes in x.tar, got 999, n00000000.tar to n00000998.tar" in said


@pytest.mark.parametrize("size", [0.4, 0.7, 0.99])
def test_an_archive_that_is_cut_off_says_after_what(tmp_path, size):
    archive = imagenet(tmp_path)
    whole = archive.read_bytes()
    with tarfile.open(archive) as file:
        first, second = file.getmembers()
    assert second.offset < 0.7 * len(whole) < 0.99 * len(whole) < second.offset_data + second.size
    archive.write_bytes(whole[: int(size * len(whole))])
    said = refusal("imagenet", archive, "--out", tmp_path / "data", *PART["imagenet"])
    last = first if size < second.offset / len(whole) else second
    assert f"ilsvrc.tar is broken or cut off: unexpected end of data after its member {last.name}" in said


def test_a_broken_header_between_classes_is_not_taken_for_the_end(tmp_path):
    archive = imagenet(tmp_path)
    with tarfile.open(archive) as file:
        at = file.getmembers()[1].offset
    archive.write_bytes(changed(archive.read_bytes(), at))
    args = ["--no-checksum", "--expect", "9", "--workers", "1"]
    said = refusal("imagenet", archive, "--out", tmp_path / "data", *args)
    assert f"no header and no mark of an end at byte {at} after its member n02084071.tar" in said


def test_a_compressed_archive_is_refused(tmp_path):
    archive = real.tar(tmp_path / "ilsvrc.tar.gz", outer(tmp_path))
    said = refusal("imagenet", archive, "--out", tmp_path / "data", *PART["imagenet"])
    assert "not compressed, got ilsvrc.tar.gz, compressed with gzip" in said


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--preset", "BSN"], "preset: expected bsn or chainer or mimicry for imagenet, got BSN"),
        (["--size", "0"], "size: expected at least 1 pixel, got 0"),
        (["--workers", "0"], "workers: expected at least 1, got 0"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, args, why):
    assert why in refusal("imagenet", imagenet(tmp_path), "--out", tmp_path / "data", *PART["imagenet"], *args)


def test_a_set_of_small_images_alone_is_not_for_chainer(tmp_path):
    small = {wnid: {"1": real.encoded(real.picture(RNG, 20, 300))} for wnid in WNIDS}
    args = ["--no-checksum", "--expect", "2", "--workers", "1", "--preset", "chainer"]
    said = refusal("imagenet", imagenet(tmp_path, small), "--out", tmp_path / "data", *args)
    assert "preset: chainer drops every image of ilsvrc.tar" in said
