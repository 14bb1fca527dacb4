"""What is there, what is not and why, and that everything works without the extension."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastsn
from fastsn import origin
from fastsn.backends import Backend, triton

ROOT = Path(fastsn.__file__).parent.parent
HAS_CPP = fastsn.backends()["cpp"].available


def bare(tmp_path: Path) -> Path:
    """A folder with the package as it is before anything is built."""
    shutil.copytree(Path(fastsn.__file__).parent, tmp_path / "fastsn", ignore=shutil.ignore_patterns("_C_*", "__pyc*"))
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "2"}


# Imports torch once, then forks for each line of code: a process of its own would take seconds for that import.
FORKS = """
import json, os, sys, traceback
import torch
for line in sys.stdin:
    folder, code, out = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        os.chdir(folder)
        sys.path[0] = folder
        for number in (1, 2):
            os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        try:
            exec(code, {})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What code prints in a new process, with the package in a folder."""
    home = tmp_path_factory.mktemp("nothing")
    command = [sys.executable, "-c", FORKS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=home, env=environment(home), **pipes) as process:

        def run(folder: Path, code: str) -> str:
            out = tmp_path_factory.mktemp("out") / "printed"
            process.stdin.write(json.dumps([str(folder), code, str(out)]) + "\n")
            process.stdin.flush()
            status = process.stdout.readline()
            assert status == "0\n", out.read_text()
            return out.read_text()

        yield run


ASK = "import fastsn; print(fastsn.__file__, *fastsn.backends()['cpp'])"
LIBRARY = "_C_torch" + "_".join(torch.__version__.split(".")[:2]) + ".abi3.so"


def test_every_implementation_says_what_it_is_or_why_it_is_not_there():
    found = fastsn.backends()
    assert list(found) == ["reference", "cpp", "triton"]
    assert found["reference"].available
    assert all(backend.detail for backend in found.values())
    if HAS_CPP:
        assert found["cpp"].detail.split(", ")[1] in ("AVX-512", "AVX2", "baseline")


def test_without_a_build_it_says_so(tmp_path, run):
    assert run(bare(tmp_path), ASK).startswith(f"{tmp_path}/fastsn/__init__.py False not built. To build them, ")


def test_a_build_that_failed_says_why(tmp_path, run):
    (bare(tmp_path) / "fastsn" / "_C_missing.txt").write_text("building them failed: no compiler\n")
    assert " False building them failed: no compiler. To build them, " in run(tmp_path, ASK)


def test_a_build_for_other_torches_is_not_loaded(tmp_path, run):
    package = bare(tmp_path) / "fastsn"
    for name in ("_C_torch1_0.abi3.so", "_C_torch2_1.abi3.so"):
        (package / name).write_text("not even a library")
    expected = f"False built for another torch (_C_torch1_0.abi3.so, _C_torch2_1.abi3.so), this is {torch.__version__}."
    assert expected in run(tmp_path, ASK)


def test_a_broken_library_is_no_reason_to_fail(tmp_path, run):
    (bare(tmp_path) / "fastsn" / LIBRARY).write_text("not a library")
    assert f"False {LIBRARY} cannot be loaded" in run(tmp_path, ASK)


@pytest.mark.skipif(not HAS_CPP, reason="needs the C++ kernels")
def test_among_the_libraries_of_several_torches_that_of_this_one_is_loaded(tmp_path, run):
    package = bare(tmp_path) / "fastsn"
    for name in ("_C_torch1_0.abi3.so", "_C_torch2_1.abi3.so", "_C_torch9_9.abi3.so"):
        (package / name).write_text("not even a library")
    shutil.copy(Path(fastsn.__file__).parent / LIBRARY, package)
    assert f"{package}/__init__.py True C++ kernels, " in run(tmp_path, ASK)


@pytest.mark.skipif(not HAS_CPP or sys.platform != "linux", reason="needs the C++ kernels")
def test_the_kernels_load_with_the_oldest_c_library_that_torch_supports():
    """That of manylinux_2_28. The names of versions stand in the library as they are."""
    content = (Path(fastsn.__file__).parent / LIBRARY).read_bytes()
    for name, newest in (("GLIBC", (2, 28)), ("GLIBCXX", (3, 4, 24)), ("CXXABI", (1, 3, 11))):
        found = re.findall(rf"\0{name}_([0-9.]+)(?=\0)".encode(), content)
        assert found
        assert max(tuple(map(int, version.split(b"."))) for version in found) <= newest, name


WARN = """
import warnings
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    import fastsn, torch
    fastsn.SNLinear(3, 4, impl="reference")(torch.ones(3))
    fastsn.SNLinear(3, 4, dtype=torch.complex64)(torch.ones(3, dtype=torch.complex64))
    torch.func.grad(lambda x: fastsn.SNLinear(3, 4)(x).sum())(torch.ones(3))
    assert not found, "too early"
    for _ in range(2):
        fastsn.BSSNLinear(3, 4)(torch.ones(3)).sum().backward()
    print(*(w.message for w in found), sep="\\n")
"""


def test_missing_kernels_are_said_once_when_they_would_have_served(tmp_path, run):
    (bare(tmp_path) / "fastsn" / "_C_missing.txt").write_text("torch was missing at the build\n")
    (message,) = run(tmp_path, WARN).splitlines()
    assert message.startswith("fastsn has no C++ kernels, weights on the CPU are normalized by the slower reference: ")
    assert "torch was missing at the build. To build them, with a C++ compiler at hand: pip install " in message
    assert '" && pip install --no-cache-dir --force-reinstall --no-deps --no-build-isolation ' in message


def test_the_warning_of_missing_kernels_breaks_no_graph(monkeypatch):
    layer = fastsn.SNLinear(3, 4)
    monkeypatch.setattr(sys.modules["fastsn.backends"], "_CPP", Backend(False, "made up"))
    monkeypatch.setattr(sys.modules["fastsn.backends"], "_warned", False)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        compiled(torch.ones(2, 3)).sum().backward()
        assert not [w for w in found if "fastsn" in str(w.message)]
        layer(torch.ones(2, 3))
        compiled(torch.ones(2, 3))
    torch._dynamo.reset()
    assert len([w for w in found if "fastsn has no C++ kernels" in str(w.message)]) == 1


NOWHERE = "CLONE_OF_FASTSN"


@pytest.mark.parametrize(
    ("told", "source"),
    [
        (None, "--no-binary fastsn fastsn==1.2"),
        ({"url": "file://{here}/a%20clone", "dir_info": {}}, "'{here}/a clone'"),
        ({"url": "file://{here}/fastsn-1.2.tar.gz", "archive_info": {}}, "{here}/fastsn-1.2.tar.gz"),
        ({"url": "https://a.b/fastsn-1.2.tar.gz", "archive_info": {}}, "https://a.b/fastsn-1.2.tar.gz"),
        ({"url": "https://a.b/fastsn", "vcs_info": {"vcs": "git", "commit_id": "c0"}}, "git+https://a.b/fastsn@c0"),
        ({"url": "file://{here}/fastsn-1.2-py3-none-any.whl", "archive_info": {}}, NOWHERE),
        ({"url": "file://{here}/gone", "dir_info": {}}, NOWHERE),
    ],
)
def test_the_line_that_repairs_takes_what_was_installed(tmp_path, monkeypatch, told, source):
    for name in ("a clone", "fastsn-1.2.tar.gz", "fastsn-1.2-py3-none-any.whl"):
        (tmp_path / name).touch()
    package = tmp_path / "fastsn-1.2.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: fastsn\nVersion: 1.2\n")
    if told:
        (package / "direct_url.json").write_text(json.dumps(told).replace("{here}", str(tmp_path)))
    distribution = importlib.metadata.PathDistribution(package)
    monkeypatch.setattr(importlib.metadata, "distribution", {"fastsn": distribution}.__getitem__)
    monkeypatch.setattr(origin, "__file__", str(tmp_path / "fastsn" / "origin.py"))
    assert origin.reinstall().endswith(f" --no-build-isolation {source.replace('{here}', str(tmp_path))}")


def test_the_line_that_repairs_a_clone_in_use_is_editable(tmp_path, monkeypatch):
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(origin, "__file__", str(tmp_path / "fastsn" / "origin.py"))
    assert origin.reinstall().endswith(f" --no-build-isolation --editable {tmp_path}")


def test_a_compiler_that_fails_does_not_stop_the_installation(tmp_path, run):
    folder = bare(tmp_path)
    for name in ("csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "fastsn" / "_C_torch0_0.abi3.so").write_text("of an earlier build")
    variables = {**os.environ, "CC": "false", "CXX": "false", "FASTSN_WERROR": "0"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=variables, capture_output=True, check=True)
    assert " False building them failed: " in run(folder, ASK)
    variables["CXX"] = "no-such-compiler -x"
    subprocess.run(command, cwd=folder, env=variables, capture_output=True, check=True)
    reason = folder / "fastsn" / "_C_missing.txt"
    assert reason.read_text().startswith("no C++ compiler, no-such-compiler is not on the PATH")
    broken = tmp_path / "broken" / "torch" / "__init__.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    variables["PYTHONPATH"] = str(broken.parent.parent)
    subprocess.run(command, cwd=folder, env=variables, capture_output=True, check=True)
    assert reason.read_text().startswith("torch could not be imported at the build: libcudart.so.12: cannot")
    variables["FASTSN_WERROR"] = "1"
    assert subprocess.run(command, cwd=folder, env=variables, capture_output=True, check=False).returncode


def test_everything_works_on_the_reference(tmp_path, run):
    """The op tests, gradients of layers and steps, with the package as it is before anything is built: this is also
    the test of the ops' rules in Python, which devices without kernels of their own use. What asks for the reference,
    and what inductor makes of a graph, is the same with the kernels. Over the shape table the reference would be
    compared with itself: one layout for what it returns."""
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in ("ops", "op_errors", "layers", "step")]
    folder = bare(tmp_path)
    assert " False " in run(folder, ASK)
    plugins = ("-p", "no:cacheprovider", "-p", "no:benchmark")
    chosen = "not inductor and not reference] and not (shape_table and not channels_last)"
    command = [sys.executable, "-m", "pytest", "-qxc", str(ROOT / "pyproject.toml"), "-k", chosen, *plugins, *files]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


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


def test_cpp_asked_for_where_it_is_missing(tmp_path, run):
    code = "import fastsn\ntry: fastsn.SNLinear(3, 4, impl='cpp')\nexcept RuntimeError as e: print(e)"
    assert run(bare(tmp_path), code).startswith("impl='cpp' is not available: not built. To build them")


@pytest.mark.skipif(not HAS_CPP, reason="needs the C++ kernels")
def test_cpp_asked_for_what_it_cannot_do():
    with pytest.raises(TypeError, match=r"impl='cpp' needs .* weights, got torch.complex64"):
        fastsn.SNLinear(3, 4, impl="cpp", dtype=torch.complex64)
    layer = fastsn.SNLinear(3, 4, impl="cpp")
    layer(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match=r"does not work inside torch\.func transforms"):
        torch.func.grad(lambda x: layer(x).sum())(torch.randn(2, 3))
    fastsn.SNLinear(3, 4)(torch.randn(2, 3))


def test_the_choice_can_be_made_while_a_graph_is_traced(monkeypatch):
    """Before anything has run: the search for an installed Triton cannot be traced."""
    module = sys.modules["fastsn.backends"]
    monkeypatch.setitem(module._DEVICES, "cpu", "triton")
    monkeypatch.setattr(module, "triton", torch.compiler.disable(lambda _: Backend(True, "a GPU")))

    @torch.compile(fullgraph=True, backend="eager")
    def served(weight: torch.Tensor) -> torch.Tensor:
        return weight + (1 if module.chosen("auto", weight) == "triton" else 2)

    assert served(torch.zeros(1)) == 1


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
                layer(2, 3, 3, scale=1.2, dtype=dtype).normalized()[0].float().sum().backward()
        with pytest.raises(AssertionError, match="slow path"):
            fastsn.SNLinear(3, 4, impl="reference")
    fastsn.SNLinear(3, 4, dtype=torch.complex64)


def test_gpus_of_amd_are_left_to_the_reference_unless_asked_for(monkeypatch):
    weight = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
    module = sys.modules["fastsn.backends"]
    monkeypatch.setattr(module, "triton", lambda _: Backend(True, "a GPU"))
    monkeypatch.setattr(module, "available", lambda impl: impl)
    assert module.chosen("auto", weight) == "triton"
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert module.chosen("auto", weight) == "reference"
    assert module.chosen("triton", weight) == "triton"
