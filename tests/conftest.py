"""What all tests share: no network, few threads, a seed per test, the real model and images."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports a library that reads it
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The models are tiny, and one process runs per core: threads that wait for one another take longer
# than the work. What tests start inherits it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
import torch

from blockfit.search import recipes
from blockfit.search.recipes import MOST_VIEWS

ROOT = Path(__file__).resolve().parents[1]

hypothesis.settings.register_profile(
    "blockfit", deadline=None, derandomize=True, max_examples=50, database=None
)
hypothesis.settings.load_profile("blockfit")
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _few_objects_to_look_at() -> None:
    """What libraries left at import is not searched for garbage, which would take a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, alone or among others."""
    random.seed(0)
    np.random.seed(0)  # libraries under test use the legacy generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _shown_once() -> Iterator[None]:
    """What decides nothing about a test is left out: few images are shown once, not eight times.

    Tests marked ``views`` run as users do, and so does all that runs in a process of its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "MOST_VIEWS", 1)
        yield


@pytest.fixture(autouse=True)
def _marked_views(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test marked ``views`` shows few images as often as users' runs do."""
    if request.node.get_closest_marker("views"):
        monkeypatch.setattr(recipes, "MOST_VIEWS", MOST_VIEWS)


@pytest.fixture(autouse=True)
def _marked_shared(request: pytest.FixtureRequest) -> None:
    """A test marked ``shared`` is skipped as one that asks for the fixture is."""
    if request.node.get_closest_marker("shared"):
        request.getfixturevalue("shared")


def _existing(path: Path) -> Path:
    if not path.exists():
        pytest.fail(f"{path} is missing although {path.parent} is there")
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real model and images: BLOCKFIT_SHARED, or ../shared of the repository.

    A folder that the variable names must exist; without the variable, tests are skipped where
    there is none.
    """
    named = os.environ.get("BLOCKFIT_SHARED")
    if named:
        return _existing(Path(named).resolve())
    folder = ROOT.parent / "shared"
    if not (folder / "models").is_dir():
        pytest.skip(f"no real model at {folder}; set BLOCKFIT_SHARED to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def shared_model(shared: Path) -> Path:
    """DINOv2-S fine-tuned on CIFAR-10, a folder in transformers' format."""
    return _existing(shared / "models" / "dinov2-small-cifar10")


@pytest.fixture(scope="session")
def cifar10_train(shared: Path) -> Path:
    """10,000 CIFAR-10 training images, parquet with the columns image and label."""
    return _existing(shared / "data" / "cifar10" / "train.parquet")


@pytest.fixture(scope="session")
def cifar10_test(shared: Path) -> Path:
    """All 10,000 CIFAR-10 test images, parquet with the columns image and label."""
    return _existing(shared / "data" / "cifar10" / "test.parquet")
