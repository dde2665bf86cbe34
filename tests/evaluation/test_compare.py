"""Models side by side, against the same figures worked out by plain forward passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Done, blockfit_command
from commandline import small as small
from families import CLASSES, FAMILIES
from families import one_thread as one_thread
from test_evaluate import everything, pair, some
from torch.nn import functional as F

import blockfit
from blockfit.data.images import Images, images
from blockfit.errors import BlockfitError
from blockfit.evaluation.compare import Comparison, Entrant, compare
from blockfit.fit.plan import Plan, Replacement, Span
from blockfit.models.preprocessing import Preprocessing

MORE = Plan((Replacement(Span(0, 3), "identity"),))


def three(data: Images) -> tuple[dict[str, Any], Comparison]:
    """An original and two small models, and their comparison."""
    torch.manual_seed(3)
    original, less, blocks, _ = pair("plain")
    _, least, _, _ = pair("plain", MORE)
    least.load_state_dict(original.state_dict(), strict=False)
    models = {"less": less, "least": least, "original": original}
    found = compare({name: Entrant(model, data, blocks) for name, model in models.items()})
    return models, found


def test_figures_and_flips_are_those_of_plain_forward_passes() -> None:
    data = some("plain", count=60)
    models, found = three(data)
    pictures, labels = everything(data)
    with torch.no_grad():
        logits = {name: model.eval()(pictures).double() for name, model in models.items()}
    right = {name: one.argmax(1) == labels for name, one in logits.items()}
    assert found.reference == "original"
    assert [*found.models] == [*models]
    for name, one in found.models.items():
        assert one.top1 is not None
        assert one.top1.value == pytest.approx(float(right[name].double().mean()))
        assert one.top1.low < one.top1.value < one.top1.high
        if name == "original":
            assert one.drop is None
            continue
        lost, gained = right["original"] & ~right[name], right[name] & ~right["original"]
        assert (one.lost, one.gained) == (int(lost.sum()), int(gained.sum()))
        assert one.drop is not None
        assert one.kl is not None
        assert one.agreement is not None
        assert one.drop.value == pytest.approx(100 * (one.lost - one.gained) / 60, abs=1e-9)
        assert one.drop.low <= one.drop.value <= one.drop.high
        kl = F.kl_div(
            logits[name].log_softmax(1), logits["original"].log_softmax(1), log_target=True,
            reduction="batchmean",
        )  # fmt: skip
        assert one.kl.value == pytest.approx(float(kl), rel=1e-4)
        same = (logits[name].argmax(1) == logits["original"].argmax(1)).double().mean()
        assert one.agreement.value == pytest.approx(float(same))
        assert {flip.image for flip in found.flips if name in flip.lost} == {
            data.records.name(i) for i in lost.nonzero()[:, 0].tolist()
        }
    assert sum(row.images for row in found.classes) == 60
    for row in found.classes:
        of_class = labels == int(row.name.removeprefix("class "))
        assert row.images == int(of_class.sum())
        for name, top1 in row.top1.items():
            assert top1.value == pytest.approx(float(right[name][of_class].double().mean()))
    assert [row.worst for row in found.classes] == sorted(
        (row.worst for row in found.classes), reverse=True
    )
    for flip in found.flips:
        assert flip.label is not None
        assert all((flip.answers[n] == flip.label) == (n in flip.gained) for n in flip.gained)
    json.dumps(found.to_json(), allow_nan=False)
    assert "points lost" in str(found.summary())
    assert "<table>" in found._repr_html_()
    pytest.importorskip("pandas")
    frame = found.to_frame()
    least = found.models["least"]
    assert least.drop is not None
    assert frame.loc["least", "drop_high"] == least.drop.high
    assert [*frame.index] == [*models]


def test_the_reference_can_be_chosen_and_a_model_equals_itself() -> None:
    data = some("plain", count=20)
    original, less, blocks, _ = pair("plain")
    entrants = {"a": original, "again": original, "less": less}
    found = compare({n: Entrant(m, data, blocks) for n, m in entrants.items()}, "less")
    assert found.reference == "less"
    assert found.models["a"] == found.models["again"]
    found = compare({n: Entrant(m, data, blocks) for n, m in entrants.items()}, "a")
    twin = found.models["again"]
    assert twin.drop is not None
    assert twin.kl is not None
    assert twin.agreement is not None
    assert (twin.lost, twin.gained, twin.drop.value, twin.agreement.value) == (0, 0, 0, 1)
    assert twin.kl.value == pytest.approx(0, abs=1e-12)
    assert twin.drop.high > 0  # twenty images cannot show that there is no difference


def test_without_labels_images_with_several_answers_are_named() -> None:
    data = some("plain", labelled=False, count=40)
    models, found = three(data)
    with torch.no_grad():
        pictures = torch.cat([batch.inputs for batch in data.batches()])  # type: ignore[misc]
        answers = [model.eval()(pictures).argmax(1) for model in models.values()]
    differ = (answers[0] != answers[2]) | (answers[1] != answers[2])
    assert len(found.flips) == int(differ.sum())
    assert found.classes == ()
    assert all(one.top1 is None and one.drop is None for one in found.models.values())
    assert all(flip.label is None and not flip.lost for flip in found.flips)


def test_models_that_prepare_images_otherwise_are_still_compared_image_by_image() -> None:
    original, less, blocks, _ = pair("plain")
    side = FAMILIES["plain"].images().shape[-1]
    rng = torch.Generator().manual_seed(0)
    arrays = torch.randint(256, (30, side, side, 3), generator=rng, dtype=torch.uint8).numpy()
    labels = (torch.arange(30) % CLASSES).numpy()

    def shown(mean: float) -> Images:
        how = {"size": [side, side], "channels": 3, "interpolation": "bilinear", "crop": False}
        how |= {"mean": [mean] * 3, "std": [0.5] * 3}
        return images((arrays, labels), preprocessing=Preprocessing("plain", how), batch_size=7)

    there = {"original": shown(0.5), "less": shown(0.2)}
    found = compare(
        {n: Entrant(m, there[n], blocks) for n, m in (("original", original), ("less", less))}
    )
    alone = compare(
        {n: Entrant(m, there["less"], blocks) for n, m in (("original", original), ("less", less))}
    )
    assert found.models["less"].top1 == alone.models["less"].top1
    assert found.models["less"].agreement is not None
    assert found.models["less"].kl is None
    assert alone.models["less"].kl is not None


def test_a_model_without_a_head_says_why_it_has_no_accuracy() -> None:
    headless, smaller, blocks, _ = pair("vit")
    data = some("vit")
    found = compare({n: Entrant(m, data, blocks) for n, m in (("a", headless), ("b", smaller))})
    assert found.models["b"].top1 is None
    assert "shape" in found.models["b"].no_head
    assert found.models["b"].feature_error is not None
    assert found.models["b"].feature_error.value > 0


def test_heads_of_other_classes_are_compared_by_right_answers_alone() -> None:
    data = some("plain", count=20)
    original, other, blocks, _ = pair("plain")
    width = other.head.in_features
    other.head = torch.nn.Linear(width, CLASSES + 2)
    found = compare({"a": Entrant(original, data, blocks), "b": Entrant(other, data, blocks)}, "a")
    one = found.models["b"]
    pictures, labels = everything(data)
    with torch.no_grad():
        right = [(m.eval()(pictures).argmax(1) == labels) for m in (original, other)]
    assert one.agreement is one.kl is None
    assert (one.lost, one.gained) == (
        int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    )  # fmt: skip
    assert one.feature_error is not None  # of the features below the heads
    assert one.feature_error.value > 0


def test_what_cannot_be_compared_is_refused() -> None:
    original, less, blocks, _ = pair("plain")
    data = some("plain")
    one = {"a": Entrant(original, data, blocks)}
    with pytest.raises(BlockfitError, match="two or more"):
        compare(one)
    with pytest.raises(BlockfitError, match="none of the models: a, b"):
        compare({**one, "b": Entrant(less, data, blocks)}, "c")
    with pytest.raises(BlockfitError, match="different images"):
        compare({**one, "b": Entrant(less, some("plain", count=9), blocks)})


def test_results_and_modules_in_a_list_are_called_by_their_places() -> None:
    model = blockfit.load("demo")
    pictures = blockfit.images("digits", model, limit=48)
    result = blockfit.compress(model, pictures, remove=1, final=0)
    found = blockfit.compare([result, model, "demo"], pictures)
    assert [*found.models] == ["model 1", "model 2", "demo"]
    with pytest.raises(blockfit.BlockfitError, match="models must be a mapping or a list, got"):
        blockfit.compare(model, pictures)  # type: ignore[arg-type]


def test_the_command_and_the_function_say_the_same(small: tuple[Path, Done]) -> None:
    given = ("compare", small[0], "demo", "--data", "digits:test", "--limit", "80")
    told = blockfit_command(*given, "--json").json
    found = blockfit.compare(
        {"small": small[0], "demo": "demo"}, blockfit.images("digits:test", limit=80)
    )
    assert found.reference == told["reference"] == "demo"
    assert json.loads(json.dumps(found.to_json())).items() <= told.items()
    page = blockfit_command(*given)
    assert "small" in page.out
    assert "demo *" in page.out
    assert "points lost" in page.out
    assert page.err.count("device: cpu") == 1
    other = blockfit_command(*given, "--against", small[0])
    assert "small *" in other.out
    refused = blockfit_command("compare", "demo", "--images", "digits:test")
    assert refused.error == "there is one model; give two or more to compare"
