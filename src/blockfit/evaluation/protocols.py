"""Other ways to judge a model than its own head: k-NN, linear probes and retrieval on its features.

Each needs labelled images to learn from and labelled images to be judged on. Of the original and a
compressed model, a probe can be asked two questions: what a head that was trained on the original's
features is worth on the compressed model's (nothing downstream changes), and what a new head that
is trained on the compressed model's own features is worth (the protocol of TBA, arXiv 2410.04941,
section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blockfit import processes as ranks
from blockfit.arguments import checked
from blockfit.data.images import Images
from blockfit.data.labels import by_name
from blockfit.errors import BlockfitError
from blockfit.models.blocks import Blocks
from blockfit.models.forward import placed
from blockfit.models.head import Observation, observe
from blockfit.progress import Progress

LEARNING = ("knn", "probe", "probe-sgd", "retrieval")
"""These learn from labelled images; ``probe`` is converged (L-BFGS), ``probe-sgd`` the paper's."""

PROTOCOLS = (*LEARNING, "zero-shot", "dense")
"""``zero-shot`` needs class names and a text tower (``zeroshot``), ``dense`` masks (``dense``)."""

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Of k-NN, as in DINO (Caron et al., arXiv 2104.14294)."""

RECALL_AT = (1, 5, 10)
EPOCHS, LEARNING_RATE, BATCH = 5, 1e-2, 256
"""Of ``probe-sgd``: Adam, as in TBA."""

Probe = Callable[["Features"], np.ndarray]
"""Features → the class of every image."""


@dataclass(frozen=True)
class Features:
    """A model's final features of labelled images.

    Args:
        values: float32, shape (images, F).
        labels: int64, shape (images,).
    """

    values: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def among(self, own: Sequence[str] | None, classes: Sequence[str] | None) -> Features:
        """The images of ``classes``, numbered by them: ``own`` names the labels as they are.

        As they are where either has no names or no class has a namesake.
        """
        place = by_name(own, classes) if own and classes else {}
        if not place:
            return self
        kept = np.isin(self.labels, [*place])
        numbers = [place[label] for label in self.labels[kept].tolist()]
        return Features(self.values[kept], np.array(numbers, dtype=np.int64))


@checked
def extract(
    model: nn.Module, blocks: Blocks, images: Images, progress: Progress | None = None
) -> Features:
    """The features that a head reads, of every labelled image, as the data set numbers labels.

    What the model's own head reads; without a head, a model's vector output; of an output with
    one vector per token, the class token's, or the mean where there is none; of a feature map, the
    mean over its positions.

    Raises:
        BlockfitError: where there is no image, no image has a label, or a feature is not finite.
    """
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    places: list[int] = []
    own, done = images.own(), 0
    for batch in own.batches():
        done += len(batch.places)
        if batch.own_labels is not None:
            known = (batch.own_labels >= 0).nonzero().flatten()
            seen = observe(model, blocks, placed(model, batch.inputs))
            rows.append(vectors(seen, blocks.prefix_tokens).float().cpu()[known])
            labels.append(batch.own_labels[known])
            places += [batch.places[row] for row in known.tolist()]
        if progress is not None:
            progress(done, len(own))
    images.exchange()
    told = ranks.gathered([rows[0].shape[1] if rows else 0, places])
    if not any(width for width, _ in told):
        raise BlockfitError(
            f"{images.records.source} holds no images with a label; k-NN, probes and retrieval "
            "need labelled ones"
        )
    values = _rows_of_all(rows, told, torch.float32)
    if not torch.isfinite(values).all():
        raise BlockfitError("the features hold NaN or infinite values; check the model's weights")
    columns = [label[:, None] for label in labels]
    numbers = _rows_of_all(columns, [(1, places) for _, places in told], torch.int64)
    return Features(values.numpy(), numbers[:, 0].numpy())


def _rows_of_all(
    rows: Sequence[Tensor], told: Sequence[tuple[int, list[int]]], dtype: torch.dtype
) -> Tensor:
    """The rows of all processes in the order of the images; ``told`` are widths and places."""
    if ranks.count() == 1:
        return torch.cat(list(rows))
    order = {place: row for row, place in enumerate(sorted(p for _, own in told for p in own))}
    width = max(width for width, _ in told)
    out = torch.zeros(len(order), width, dtype=dtype)
    if rows:
        out[[order[place] for place in told[ranks.rank()][1]]] = torch.cat(list(rows))
    ranks.reduce([out])  # every row is one process's, and zero on the others
    return out


def vectors(seen: Observation, prefix_tokens: int) -> Tensor:
    """One vector per image."""
    whole = seen.features.reshape(seen.shape)
    if whole.ndim == 3:
        return whole[:, 0] if prefix_tokens else whole.mean(1)
    return whole.flatten(2).mean(2) if whole.ndim == 4 else seen.features


def knn(train: Features, k: int = NEIGHBOURS, temperature: float = TEMPERATURE) -> Probe:
    """Weighted k-NN: the k nearest by cosine vote with weight exp(cosine / temperature)."""
    from sklearn.neighbors import KNeighborsClassifier

    judge = KNeighborsClassifier(
        n_neighbors=min(k, len(train)),
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    )
    judge.fit(train.values, train.labels)
    return lambda test: np.asarray(judge.predict(test.values))


def linear_probe(train: Features) -> Probe:
    """Logistic regression on standardised features, trained to convergence (L-BFGS)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    _check_classes(train)
    judge = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    judge.fit(train.values, train.labels)
    return lambda test: np.asarray(judge.predict(test.values))


def linear_probe_sgd(train: Features, seed: int = 0) -> Probe:
    """The paper's probe: one linear layer, Adam, 5 epochs, learning rate 1e-2, batches of 256."""
    _check_classes(train)
    classes, numbers = np.unique(train.labels, return_inverse=True)
    values, targets = torch.from_numpy(train.values), torch.from_numpy(numbers)
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(values.shape[1], len(classes))
    bound = values.shape[1] ** -0.5
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    optimizer = torch.optim.Adam(layer.parameters(), lr=LEARNING_RATE)
    with torch.enable_grad():
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(values), generator=generator).split(BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(layer(values[rows]), targets[rows]).backward()
                optimizer.step()

    def guess(test: Features) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(classes[layer(torch.from_numpy(test.values)).argmax(1).numpy()])

    return guess


def recall(train: Features, test: Features, at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Recall@k of retrieval by cosine: the part of the test images with one of their class among
    the k nearest of ``train``."""
    from sklearn.neighbors import NearestNeighbors

    most = min(max(at), len(train))
    search = NearestNeighbors(n_neighbors=most, metric="cosine", algorithm="brute")
    near = search.fit(train.values).kneighbors(test.values, return_distance=False)
    hit = train.labels[near] == test.labels[:, None]
    return {f"recall@{k}": float(hit[:, :k].any(1).mean()) for k in at}


@checked
def judge(
    protocols: Sequence[str],
    train: dict[str, Features],
    test: dict[str, Features],
) -> dict[str, dict[str, Any]]:
    """Judge the models by protocols.

    Args:
        protocols: of ``LEARNING``.
        train: features to learn from, by model: ``compressed`` and, where there is one,
            ``original``.
        test: features to be judged on, likewise.

    Returns:
        protocol → model → accuracy as a fraction (for ``retrieval``, recall by k). For k-NN and
        probes, ``compressed_with_original_head`` is what was learnt from the original's features,
        judged on the compressed model's.

    Raises:
        BlockfitError: for an unknown protocol, or where only one class is there.
    """
    check_protocols(protocols)
    makers: dict[str, Callable[[Features], Probe]] = {
        "knn": knn,
        "probe": linear_probe,
        "probe-sgd": linear_probe_sgd,
    }
    out: dict[str, dict[str, Any]] = {}
    for protocol in protocols:
        if protocol == "retrieval":
            out[protocol] = {name: recall(train[name], test[name]) for name in test}
            continue
        probes = {name: makers[protocol](train[name]) for name in test}
        out[protocol] = {name: _accuracy(probes[name], test[name]) for name in test}
        if "original" in test:
            fixed = _accuracy(probes["original"], test["compressed"])
            out[protocol]["compressed_with_original_head"] = fixed
    return out


def check_protocols(protocols: Sequence[str]) -> None:
    """Refuse unknown protocols."""
    for name in protocols:
        if name not in PROTOCOLS:
            raise BlockfitError(
                f"unknown protocol {name!r}; choose one of {', '.join(PROTOCOLS)} "
                "(the model's own head is always judged)"
            )


def _accuracy(probe: Probe, test: Features) -> float:
    return float((probe(test) == test.labels).mean())


def _check_classes(train: Features) -> None:
    if len(np.unique(train.labels)) < 2:
        raise BlockfitError(
            "the images to learn from are all of one class; draw them over the whole set "
            "(limit= does)"
        )
