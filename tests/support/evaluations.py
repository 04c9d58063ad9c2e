"""What evaluations need: pictures, a feature network, a reference, and the network's options of the command line."""

import pytest
import torch

from tests.support.feature_networks import Tiny, save_network


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> str:
    """80 pictures of many sizes, in two folders."""
    from tests.support.pictures import write_pictures

    root = tmp_path_factory.mktemp("photographs")
    write_pictures(root, 80, (24, 150), ["0", "1"])
    return str(root)


@pytest.fixture(scope="session")
def feature_network(tmp_path_factory) -> dict[str, str]:
    """Options of the command line, and of ``EvaluationOptions``."""
    file, digest = save_network(Tiny(), tmp_path_factory.mktemp("network"))
    return {"network": file, "network_sha256": digest}


@pytest.fixture(scope="session")
def reference(tmp_path_factory, photographs, feature_network) -> str:
    from fitv2_scale.evaluate.evaluate import EvaluationOptions, evaluate_images

    file = str(tmp_path_factory.mktemp("reference") / "32x48.npz")
    evaluate_images(photographs, "32x48", EvaluationOptions(**feature_network), file, torch.device("cpu"))
    return file


def network_options(network: dict[str, str]) -> list[str]:
    return [word for name, value in network.items() for word in (f"--{name.replace('_', '-')}", value)]
