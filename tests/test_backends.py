"""What is there, what is not and why, and that everything works without the extension."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastsn
from fastsn.backends import triton

ROOT = Path(fastsn.__file__).parent.parent
HAS_CPP = fastsn.backends()["cpp"].available


def bare(tmp_path: Path) -> Path:
    """A folder with the package as it is before anything is built."""
    shutil.copytree(Path(fastsn.__file__).parent, tmp_path / "fastsn", ignore=shutil.ignore_patterns("_C_*", "__pyc*"))
    return tmp_path


def run(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "2"}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


ASK = "import fastsn; print(fastsn.__file__, *fastsn.backends()['cpp'])"


def test_every_implementation_says_what_it_is_or_why_it_is_not_there():
    found = fastsn.backends()
    assert list(found) == ["reference", "cpp", "triton"]
    assert found["reference"].available
    assert all(backend.detail for backend in found.values())
    if HAS_CPP:
        assert found["cpp"].detail.split(", ")[1] in ("AVX-512", "AVX2", "baseline")


def test_without_a_build_the_reason_is_that_torch_was_missing(tmp_path):
    assert run(bare(tmp_path), "-c", ASK).startswith(f"{tmp_path}/fastsn/__init__.py False not built, torch was")


def test_a_build_that_failed_says_why(tmp_path):
    (bare(tmp_path) / "fastsn" / "_C_missing.txt").write_text("building them failed: no compiler\n")
    assert run(tmp_path, "-c", ASK).endswith("False building them failed: no compiler\n")


def test_a_build_for_another_torch_is_not_loaded(tmp_path):
    (bare(tmp_path) / "fastsn" / "_C_torch1_0.abi3.so").write_text("not even a library")
    assert "False built for another torch (_C_torch1_0.abi3.so)" in run(tmp_path, "-c", ASK)


def test_a_broken_library_is_no_reason_to_fail(tmp_path):
    name = "_C_torch" + "_".join(torch.__version__.split(".")[:2]) + ".abi3.so"
    (bare(tmp_path) / "fastsn" / name).write_text("not a library")
    assert f"False {name} cannot be loaded" in run(tmp_path, "-c", ASK)


def test_a_compiler_that_fails_does_not_stop_the_installation(tmp_path):
    folder = bare(tmp_path)
    for name in ("csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "fastsn" / "_C_torch0_0.abi3.so").write_text("of an earlier build")
    environment = {**os.environ, "CC": "false", "CXX": "false", "FASTSN_WERROR": "0"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)
    assert " False building them failed: " in run(folder, "-c", ASK)
    environment["FASTSN_WERROR"] = "1"
    assert subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False).returncode


def test_everything_works_on_the_reference(tmp_path):
    """The op tests, gradients of layers and steps, with the package as it is before anything is built: this is also
    the test of the ops' rules in Python, which devices without kernels of their own use."""
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in ("ops", "op_errors", "layers", "step")]
    folder = bare(tmp_path)
    assert " False " in run(folder, "-c", ASK)
    plugins = ("-p", "no:cacheprovider", "-p", "no:benchmark")
    out = run(folder, "-m", "pytest", "-qxc", str(ROOT / "pyproject.toml"), *plugins, *files)
    assert " passed" in out


@pytest.mark.parametrize("impl", ["cuda", "", None, "Reference"])
def test_an_unknown_implementation(impl):
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'reference', 'cpp', 'triton', got"):
        fastsn.SNLinear(3, 4, impl=impl)


@pytest.fixture
def gpu(monkeypatch):
    """As if there were one: ``gpu(name, capability)``."""

    def pretend(name: str = "NVIDIA H200", capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

    triton.cache_clear()
    yield pretend
    triton.cache_clear()


def triton_is(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    def found(name: str) -> str:
        assert name == "triton"
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_triton_is_not_available(monkeypatch):
    triton_is(monkeypatch, "3.6.0")
    assert fastsn.backends()["triton"] == (False, "torch finds no GPU")
    with pytest.raises(RuntimeError, match="impl='triton' is not available: torch finds no GPU"):
        fastsn.spectral_norm(nn.Linear(3, 4), impl="triton")
    triton_is(monkeypatch, None)
    assert fastsn.backends()["triton"].detail == "torch finds no GPU; Triton is not installed, 3.5 is needed"


def test_a_gpu_without_triton_or_with_an_old_one(gpu, monkeypatch):
    gpu()
    triton_is(monkeypatch, None)
    assert fastsn.backends()["triton"] == (False, "Triton is not installed, 3.5 is needed")
    triton.cache_clear()
    triton_is(monkeypatch, "3.4.1+git12ab")
    assert fastsn.backends()["triton"] == (False, "Triton 3.4.1+git12ab is too old, 3.5 is needed")


def test_a_gpu_that_is_too_old(gpu, monkeypatch):
    gpu("Tesla P100", (6, 0))
    triton_is(monkeypatch, "3.6.0")
    assert fastsn.backends()["triton"] == (False, "Tesla P100 has compute capability 6.0, 7.0 is needed")


@pytest.mark.parametrize("version", ["3.5.0", "3.6.0", "3.10.0", "4.0"])
def test_a_gpu_with_triton(gpu, monkeypatch, version):
    gpu()
    triton_is(monkeypatch, version)
    assert fastsn.backends()["triton"] == (True, f"Triton {version} kernels, NVIDIA H200")
    with pytest.raises(ValueError, match="impl='triton' needs weights on cuda, got one on cpu"):
        fastsn.spectral_norm(nn.Linear(3, 4), impl="triton")


def test_cpp_asked_for_where_it_is_missing(tmp_path):
    code = "import fastsn\ntry: fastsn.SNLinear(3, 4, impl='cpp')\nexcept RuntimeError as e: print(e)"
    assert run(bare(tmp_path), "-c", code).startswith("impl='cpp' is not available: not built, torch was missing")


@pytest.mark.skipif(not HAS_CPP, reason="needs the C++ kernels")
def test_cpp_asked_for_what_it_cannot_do():
    with pytest.raises(TypeError, match=r"impl='cpp' needs .* weights, got torch.complex64"):
        fastsn.SNLinear(3, 4, impl="cpp", dtype=torch.complex64)
    layer = fastsn.SNLinear(3, 4, impl="cpp")
    layer(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match=r"does not work inside torch\.func transforms"):
        torch.func.grad(lambda x: layer(x).sum())(torch.randn(2, 3))
    fastsn.SNLinear(3, 4)(torch.randn(2, 3))


@pytest.mark.skipif(not HAS_CPP, reason="needs the C++ kernels")
def test_kernels_serve_what_they_can_and_the_reference_the_rest(monkeypatch):
    """If the reference were asked where the kernels can, this would raise."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the slow path was taken")

    layers = [getattr(fastsn, f"BSSN{name}") for name in ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d")]
    with monkeypatch.context() as patch:
        for name in ("power_iteration", "sigmas", "rescale"):
            patch.setattr(f"fastsn.reference.{name}", refuse)
        for layer in layers:
            for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
                layer(2, 3, 3, scale=1.2, dtype=dtype).normalised()[0].float().sum().backward()
        with pytest.raises(AssertionError, match="slow path"):
            fastsn.SNLinear(3, 4, impl="reference")
    fastsn.SNLinear(3, 4, dtype=torch.complex64)
