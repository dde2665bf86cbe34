"""k-NN, probes and retrieval, against what they are by definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES
from families import one_thread as one_thread

from blockfit.data.images import images
from blockfit.errors import BlockfitError
from blockfit.evaluation.protocols import (
    Features,
    check_protocols,
    extract,
    judge,
    knn,
    linear_probe,
    linear_probe_sgd,
    recall,
)
from blockfit.models.blocks import find_chain


def cloud(count: int, seed: int, apart: float = 3.0, classes: int = 4, width: int = 12) -> Features:
    """Features of ``classes`` kinds around fixed centres."""
    centres = np.random.default_rng(99).normal(size=(classes, width)) * apart
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    values = (centres[labels] + rng.normal(size=(count, width))).astype(np.float32)
    return Features(values, labels)


def accuracy(guessed: np.ndarray, test: Features) -> float:
    return float((guessed == test.labels).mean())


def test_knn_is_the_weighted_vote_of_the_nearest_by_cosine() -> None:
    train, test = cloud(60, 0, apart=0.7), cloud(25, 1, apart=0.7)
    a, b = (torch.nn.functional.normalize(torch.tensor(f.values)) for f in (test, train))
    near = (a @ b.T).topk(20, dim=1)
    votes = torch.zeros(25, 4)
    for row in range(25):
        for sim, column in zip(near.values[row], near.indices[row], strict=True):
            votes[row, int(train.labels[int(column)])] += torch.exp(sim / 0.07)
    assert np.array_equal(knn(train)(test), votes.argmax(1).numpy())
    assert 0.3 < accuracy(knn(train)(test), test) < 1  # a case in which neighbours disagree


def test_knn_takes_all_images_where_there_are_fewer_than_k() -> None:
    train, test = cloud(8, 0), cloud(10, 1)
    assert knn(train)(test).shape == (10,)


@pytest.mark.parametrize("make", [linear_probe, linear_probe_sgd])
def test_a_probe_learns_what_can_be_learnt_and_nothing_from_noise(make) -> None:  # type: ignore[no-untyped-def]
    train, test = cloud(2000, 0), cloud(500, 1)
    assert accuracy(make(train)(test), test) > 0.97
    shuffled = Features(train.values, np.random.default_rng(0).permutation(train.labels))
    assert accuracy(make(shuffled)(test), test) < 0.5


def test_the_converged_probe_does_not_mind_the_scale_of_the_features() -> None:
    train, test = cloud(300, 0, apart=1.0), cloud(200, 1, apart=1.0)
    scale = np.logspace(-3, 3, 12).astype(np.float32)
    scaled = [Features(f.values * scale, f.labels) for f in (train, test)]
    found = linear_probe(scaled[0])(scaled[1])
    assert np.array_equal(found, linear_probe(train)(test))


def test_the_short_probe_is_the_same_for_the_same_seed() -> None:
    train, test = cloud(600, 0, apart=0.5), cloud(300, 1, apart=0.5)
    first, again, other = (linear_probe_sgd(train, seed)(test) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_probes_give_back_the_labels_as_they_are_numbered() -> None:
    train, test = cloud(300, 0), cloud(50, 1)
    moved = Features(train.values, train.labels * 10 + 3)
    for make in (linear_probe, linear_probe_sgd, knn):
        assert set(make(moved)(test)) <= {3, 13, 23, 33}


def test_recall_counts_images_with_one_of_their_class_among_the_nearest() -> None:
    train = Features(np.eye(3, dtype=np.float32), np.array([0, 1, 2]))
    test = Features(
        np.array([[1, 0.2, 0.1], [1, 0.5, 0], [0.1, 1, 0.5]], dtype=np.float32), np.array([0, 1, 0])
    )
    found = recall(train, test, at=(1, 2, 3))
    assert found == {"recall@1": pytest.approx(1 / 3), "recall@2": pytest.approx(2 / 3),
                     "recall@3": pytest.approx(1)}  # fmt: skip


def test_a_head_of_the_original_is_judged_on_the_compressed_models_features() -> None:
    train, test = cloud(400, 0), cloud(200, 1)
    turned = [Features(-f.values, f.labels) for f in (train, test)]
    found = judge(
        ["probe", "knn", "retrieval"],
        {"original": train, "compressed": turned[0]},
        {"original": test, "compressed": turned[1]},
    )
    assert found["probe"]["original"] == found["probe"]["compressed"] > 0.95
    assert found["probe"]["compressed_with_original_head"] < 0.6
    assert found["retrieval"]["compressed"]["recall@1"] > 0.9
    alone = judge(["knn"], {"compressed": train}, {"compressed": test})
    assert alone["knn"].keys() == {"compressed"}


@pytest.mark.parametrize(
    ("name", "width"),
    [("timm-vit", 32), ("dinov2", 32), ("vit-classifier", 32)],
)
def test_features_are_one_vector_per_image(name: str, width: int) -> None:
    family = FAMILIES[name]
    model, pictures = family.build(), family.images(6)
    blocks = find_chain(model, pictures)
    found = extract(model, blocks, images((pictures, torch.arange(6)), batch_size=4))
    assert found.values.shape == (6, width)
    assert found.values.dtype == np.float32
    assert found.labels.tolist() == [0, 1, 2, 3, 4, 5]
    if name == "dinov2":
        with torch.no_grad():
            expected = model(pictures).last_hidden_state[:, 0]
        assert torch.allclose(torch.tensor(found.values), expected, atol=1e-5)


def test_wrong_calls_say_what_is_missing() -> None:
    family = FAMILIES["timm-vit"]
    model = family.build()
    blocks = find_chain(model, family.images())
    with pytest.raises(BlockfitError, match="holds no images with a label"):
        extract(model, blocks, images(family.images()))
    with pytest.raises(BlockfitError, match="unknown protocol 'svm'; choose one of knn"):
        check_protocols(["knn", "svm"])
    same = Features(np.ones((5, 3), np.float32), np.zeros(5, int))
    for make in (linear_probe, linear_probe_sgd):
        with pytest.raises(BlockfitError, match="all of one class"):
            make(same)
