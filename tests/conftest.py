import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def classifier_cache(tmp_path_factory):
    """A folder with the digit classifier in it, trained once for all tests."""
    from gan import data, evaluate

    folder = tmp_path_factory.mktemp("classifier")
    evaluate.digit_classifier(data.digits(8), folder)
    return folder
