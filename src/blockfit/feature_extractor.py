"""A model's features as a step of scikit-learn's pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import nn

from blockfit.api import as_saved
from blockfit.data.images import Images
from blockfit.data.images import images as open_images
from blockfit.errors import BlockfitError
from blockfit.evaluation.protocols import vectors
from blockfit.formats.folder import Saved
from blockfit.models.blocks import Blocks
from blockfit.models.forward import placed
from blockfit.models.head import observe
from blockfit.models.stages import find_blocks
from blockfit.models.wrappers import bare
from blockfit.search.run import Result


class FeatureExtractor(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """The features that a model's head reads, one row per image.

    Nothing is learnt in ``fit``: it loads the model and looks at one image. Clones share a model
    that was given as one. ``transform`` takes images and returns float32 of shape (images, F): what
    the model's own head reads; without a head its vector output, or of an output with a vector per
    token the class token's, or the mean where there is none.

    Args:
        model: a model or its name, a folder that ``save`` wrote, or a ``Result``.
        batch_size: images per forward pass.
        preprocessing: a function from a Pillow image to a tensor (channels, height, width), instead
            of the model's own.
        device: where the model runs, such as ``"cuda"``; where it is by default.

    Attributes:
        model_: the model.
        blocks_: where its blocks are.
        n_features_out_: F.

    Examples:
        >>> from sklearn.linear_model import LogisticRegression
        >>> from sklearn.pipeline import make_pipeline
        >>> pipeline = make_pipeline(FeatureExtractor("demo"), LogisticRegression())
    """

    def __init__(
        self,
        model: nn.Module | Result | str | Path,
        *,
        batch_size: int = 32,
        preprocessing: Any = None,
        device: str | None = None,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.preprocessing = preprocessing
        self.device = device

    def fit(self, X: Any, y: Any = None) -> FeatureExtractor:
        """Load the model and look at the first image.

        Args:
            X: images: a list of Pillow images or paths, a uint8 array (N, H, W[, C]), a prepared
                tensor (N, C, H, W), or whatever else ``blockfit.images`` takes.
            y: not used.

        Raises:
            BlockfitError: where there is no such model, no image, or no blocks are found.
        """
        if isinstance(self.model, (Result, Saved)) or not isinstance(self.model, nn.Module):
            saved = as_saved(self.model)
            self.model_, known = saved.model, saved.blocks
        else:
            self.model_, known = bare(self.model), None
        if self.device is not None:
            self.model_.to(self.device)
        first = next(iter(self._images(X).take(1)), None)
        if first is None:
            raise BlockfitError("the first image cannot be read; give images that can")
        self.blocks_: Blocks = find_blocks(self.model_, first) if known is None else known
        self.n_features_out_ = self._rows(first).shape[1]
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The features of images.

        Args:
            X: as in ``fit``.

        Returns:
            float32 of shape (images, F), in the order of ``X``.

        Raises:
            BlockfitError: where an image cannot be read, for there is no row to leave out.
        """
        check_is_fitted(self)
        images = self._images(X)
        rows = [self._rows(batch.inputs) for batch in images.batches()]
        if images.skipped:
            names = ", ".join(images.skipped[:3])
            raise BlockfitError(
                f"{len(images.skipped)} images cannot be read ({names}); remove them"
            )
        return np.concatenate(rows)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """``feature0``, ``feature1`` and so on."""
        check_is_fitted(self)
        names = [f"feature{number}" for number in range(self.n_features_out_)]
        return np.asarray(names, dtype=object)

    def _images(self, X: Any) -> Images:
        if isinstance(X, Images):
            return X
        how = {"batch_size": self.batch_size, "preprocessing": self.preprocessing}
        return open_images(X, self.model_, **how)

    def _rows(self, inputs: Any) -> np.ndarray:
        seen = observe(self.model_, self.blocks_, placed(self.model_, inputs))
        return vectors(seen, self.blocks_.prefix_tokens).float().cpu().numpy()

    def __sklearn_clone__(self) -> FeatureExtractor:
        return type(self)(**self.get_params(deep=False))

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "n_features_out_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        tags.input_tags.string = True
        tags.no_validation = True
        tags.transformer_tags.preserves_dtype = []
        return tags
