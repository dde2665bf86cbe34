"""What ``blockfit evaluate --protocol`` asks for, checked first and judged last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from blockfit.commands.output import Output
from blockfit.data.images import Images
from blockfit.errors import BlockfitError
from blockfit.evaluation.dense import confusion, open_masks, scores
from blockfit.evaluation.protocols import LEARNING, Features, check_protocols, extract, judge
from blockfit.evaluation.zeroshot import PROMPT, class_embeddings, read_names, right, with_intervals
from blockfit.models.blocks import Blocks
from blockfit.models.load import source_of
from blockfit.models.stages import find_blocks
from blockfit.models.text_tower import tokenizer


@dataclass(frozen=True)
class Wanted:
    """The protocols, and the options that belong to some of them."""

    protocols: tuple[str, ...]
    train: str | None
    classes: Path | None
    prompts: list[str] | None
    masks: str | None

    def check(self, by_images: bool) -> None:
        """Refuse what does not go together, before anything is loaded."""
        check_protocols(self.protocols)
        if self.protocols and not by_images:
            raise BlockfitError(
                "--protocol judges by labelled images alone; give --images without --texts"
            )
        if (self.train is None) == bool(self._learning):
            raise BlockfitError(
                "--protocol and --train go together: k-NN, probes and retrieval learn from "
                "labelled images, such as --protocol knn --train TRAIN_IMAGES"
            )
        if (self.classes or self.prompts) and "zero-shot" not in self.protocols:
            raise BlockfitError("--classes and --prompt belong to --protocol zero-shot; add it")
        if (self.masks is None) == ("dense" in self.protocols):
            raise BlockfitError(
                "--protocol dense and --masks go together: give the folder with one mask per "
                "image, or the column of --images that holds them"
            )

    @property
    def _learning(self) -> list[str]:
        return [name for name in self.protocols if name in LEARNING]

    def judge(
        self,
        out: Output,
        models: Mapping[str, nn.Module | None],
        where: Blocks | None,
        train: Images | None,
        test: Images,
        data: str,
    ) -> dict[str, Any]:
        """Judge the models that are there; protocol → model → figure or figures."""
        there = {name: model for name, model in models.items() if model is not None}
        found: dict[str, Any] = {}
        if train is not None and (shared := test.shared_with(train)):
            out.warn(
                [
                    f"{shared} of the {len(test)} test images are among the training images, where "
                    "they are found again; give others with --images or --train"
                ]
            )
        if set(self.protocols) - {"dense"}:
            tested = _features(out, there, where, test, "test")
        if train is not None:
            learnt = _features(out, there, where, train, "train")
            out.say("learning from the features")
            names = (test.records.class_names, train.records.class_names)
            same = {name: features.among(*names) for name, features in tested.items()}
            found |= judge(self._learning, learnt, same)
        if "zero-shot" in self.protocols:
            found["zero-shot"] = self._zero_shot(out, there, test, tested)
        if self.masks is not None:
            masks = open_masks(self.masks, data)
            out.say("comparing maps with masks")
            found["dense"] = {
                name: scores(confusion(model, test, masks, out.count))
                for name, model in there.items()
            }
        return {name: found[name] for name in self.protocols}

    def _zero_shot(
        self,
        out: Output,
        models: Mapping[str, nn.Module],
        test: Images,
        tested: Mapping[str, Features],
    ) -> dict[str, Any]:
        own = test.records.class_names
        names = read_names(self.classes) if self.classes is not None else own
        if not names:
            raise BlockfitError(
                "the images come without class names; give --classes FILE, one name per line in "
                "the order of the labels"
            )
        model = models.get("original", models["compressed"])
        out.say(f"embedding the names of {len(names)} classes")
        tokenize = tokenizer(model, source_of(model))
        found = {}
        for name, one in models.items():  # each with its own text tower, which may be smaller
            classes = class_embeddings(one, tokenize, names, self.prompts or [PROMPT])
            found[name] = right(classes, tested[name].among(own, names))
        return with_intervals(found)


def _features(
    out: Output,
    models: Mapping[str, nn.Module],
    where: Blocks | None,
    images: Images,
    which: str,
) -> dict[str, Features]:
    found = {}
    for name, model in models.items():
        out.say(f"features of the {name} model on the {which} images")
        blocks = where or find_blocks(model, next(iter(images)))
        found[name] = extract(model, blocks, images, out.count)
    return found
