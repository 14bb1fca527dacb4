"""Where the tests run. FASTSN_TEST_ON=cuda: everything on the GPU. FASTSN_TEST_ON=interpreter: Triton's interpreter is
in the place of the C++ kernels. Otherwise on the CPU, as users would, and on the interpreter where a test asks for it;
with TRITON_INTERPRET=0, which is for machines with a GPU, the tests of training that are for one run there.
"""

import os
import sys
from contextlib import nullcontext

# MKL's products have other bits where a vector lies elsewhere in memory (seen on AMD), which "to the bit" is not about.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")  # before torch is imported

import pytest
import torch

ON = os.environ.get("FASTSN_TEST_ON", "")
if ON == "cuda":
    torch.set_default_device("cuda")
    # Two runs of a network give the same bits, as on a CPU: where two implementations differ, it is by themselves.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported
# Of the compiler, when it is imported: each of its workers would import torch, for a kernel or two.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


def pytest_configure(config):
    """Without the C++ kernels the tests run on the reference; that this is said once is tested in test_backends.py."""
    import fastsn

    if not fastsn.backends()["cpp"].available:
        config.addinivalue_line("filterwarnings", r"ignore:fastsn has no C\+\+ kernels:UserWarning")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _everywhere():
    with _interpreter() if ON == "interpreter" else nullcontext():
        yield


@pytest.fixture
def triton_kernels():
    """The ops run on the Triton kernels: of the GPU, if there is one, otherwise in their interpreter."""
    with nullcontext() if ON else _interpreter():
        yield


def _interpreter():
    import interpreted

    return interpreted.kernels()


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def classifier_cache(tmp_path_factory):
    """A folder with the digit classifier in it, trained once for all tests."""
    from gan.data.digits import digits
    from gan.metrics import digits as classifier
    from gan.metrics import protocols

    folder = tmp_path_factory.mktemp("classifier")
    classifier.digit_classifier(digits(8), protocols.find("digits").scale, folder)
    return folder


@pytest.fixture
def grid_files(tmp_path, monkeypatch):
    """A folder whose files are grids of sweeps too, for one test: the next one's file of the same name is read anew."""
    import grids

    folder = tmp_path / "grids"
    folder.mkdir()
    monkeypatch.setattr(grids, "__path__", [*grids.__path__, str(folder)])
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("grids."):
            del sys.modules[name]


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    """Two processes of a gloo group."""
    from ranks import started

    with started(2, tmp_path_factory.mktemp("two")) as ranks:
        yield ranks
