"""Where the tests run: FASTSN_TEST_ON=interpreter puts Triton's interpreter in the place of the C++ kernels for CPU
tensors, FASTSN_TEST_ON=cuda makes everything on the GPU; without it, tests run on the CPU as users would."""

import os

import pytest
import torch

ON = os.environ.get("FASTSN_TEST_ON", "")
if ON == "interpreter":
    os.environ["TRITON_INTERPRET"] = "1"
if ON == "cuda":
    torch.set_default_device("cuda")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _interpreted():
    if ON == "interpreter":
        import interpreted

        with interpreted.kernels():
            yield
    else:
        yield


@pytest.fixture(scope="session")
def classifier_cache(tmp_path_factory):
    """A folder with the digit classifier in it, trained once for all tests."""
    from gan import data, evaluate

    folder = tmp_path_factory.mktemp("classifier")
    evaluate.digit_classifier(data.digits(8), folder)
    return folder
