"""Labels go by name or by number; what fits nowhere is named and not counted, never guessed."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import blockfit_command as run
from pictures import PIXELS, encoded, folder_of, grey, labels, table
from tiny_models import timm_model, tiny
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import blockfit
from blockfit.data.images import Images, images
from blockfit.data.labels import Matching, by_name, match

ANIMALS = ["ant", "bee", "cow", "dog", "eel"]


def named(*names: str) -> nn.Module:
    """A classifier whose config names its classes, as transformers' do."""
    model = nn.Module()
    model.head = nn.Linear(2, len(names))
    model.config = type(
        "Config", (), {"id2label": dict(enumerate(names)), "num_labels": len(names)}
    )
    return model


def unnamed(count: int = 5) -> nn.Module:
    return named(*[f"LABEL_{i}" for i in range(count)])


def folders(root: Path, *names: str, each: int = 2) -> Path:
    for name in names:
        folder_of(root / name, each)
    return root


def opened(source: Any, model: nn.Module | None, **options: Any) -> Images:
    return images(source, model, preprocessing=PIXELS, **options)


def by_folder(data: Images) -> dict[str, int]:
    """The label of each class folder; −1 where it is not counted."""
    found: dict[str, int] = {}
    for batch in data.batches():
        numbers = [-1] * len(batch.names) if batch.labels is None else batch.labels.tolist()
        for name, number in zip(batch.names, numbers, strict=True):
            assert found.setdefault(Path(name).parent.name, number) == number
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_case_6_one_renamed_class_costs_no_other(batch_size: int, tmp_path: Path) -> None:
    folders(tmp_path, "ant", "bee", "dog", "eel", "a_cow")
    data = opened(tmp_path, named(*ANIMALS), batch_size=batch_size)
    assert by_folder(data) == {"ant": 0, "bee": 1, "dog": 3, "eel": 4, "a_cow": -1}
    assert data.labels_line == 'labels by name: 4 of 5 folders; 2 images of "a_cow" not counted'
    assert data.class_names == ANIMALS


def test_case_6_one_more_and_one_fewer_class(tmp_path: Path) -> None:
    folders(tmp_path, "eel", "background", "bee", "ant", "dog")
    data = opened(tmp_path, named(*ANIMALS))
    assert by_folder(data) == {"ant": 0, "bee": 1, "dog": 3, "eel": 4, "background": -1}
    told = data.description()["labels"]
    assert told["by"] == "name"
    assert (told["counted"], told["not_counted"]) == (8, {'"background"': 2})


@pytest.mark.parametrize(
    ("own", "known"),
    [
        (["Golden_Retriever", "SIAMESE-CAT"], ["siamese cat", "golden retriever"]),
        ([unicodedata.normalize("NFD", "Köter"), "Aal"], ["aal", "köter"]),
        (["tench", "cock"], ["rooster, cock", "tench, Tinca tinca"]),
        (["T-shirt_top", "Coat"], ["coat", "T-shirt/top"]),
        (["07", "010"], ["10", "7"]),
    ],
    ids=["case and signs", "Unicode", "aliases", "slash", "zeros"],
)
def test_names_are_compared_as_people_read_them(own: list[str], known: list[str]) -> None:
    assert by_name(own, known) == {0: 1, 1: 0}


def test_a_name_that_two_classes_share_fits_neither() -> None:
    """ImageNet's "crane" is a bird and a machine; the whole list in its order is no riddle."""
    known = ["crane", "tench", "crane"]
    assert by_name(["crane", "tench"], known) == {1: 1}
    assert by_name(known, known) == {0: 0, 1: 1, 2: 2}
    assert by_name(["Cat", "cat"], ["cat", "Cat"]) == {0: 1, 1: 0}  # as they are comes first


@pytest.mark.parametrize("pattern", ["{}", "{:03d}", "class_{}", "LABEL_{}", "Class {:02d}"])
@pytest.mark.parametrize("kind", ["no names", "timm", "names of numbers"])
def test_case_7_folders_that_are_numbers_go_by_number(
    pattern: str, kind: str, tmp_path: Path
) -> None:
    model = unnamed(12)
    if kind == "timm":
        model = nn.Module()
        model.num_classes, model.pretrained_cfg = 12, {}  # type: ignore[assignment]
    if kind == "names of numbers":
        model = named(*map(str, range(12)))
    folders(tmp_path, *[pattern.format(i) for i in range(12)], each=1)
    data = opened(tmp_path, model)
    assert by_folder(data) == {pattern.format(i): i for i in range(12)}
    assert str(data.labels_line).startswith("labels by n")


def test_case_7_a_part_of_the_numbers_and_one_outside(tmp_path: Path) -> None:
    folders(tmp_path, "2", "10", "12", "other", each=1)
    data = opened(tmp_path, unnamed(12))
    assert by_folder(data) == {"2": 2, "10": 10, "12": -1, "other": -1}
    line = 'labels by number; 1 image of "12", 1 image of "other" not counted'
    assert data.labels_line == line


def test_case_7_numbers_that_begin_with_one(tmp_path: Path) -> None:
    """As Oxford's flowers are numbered: no class of five is called 5 unless they begin with 1."""
    folders(tmp_path, "1", "2", "3", "4", "5", each=1)
    data = opened(tmp_path, unnamed())
    assert by_folder(data) == {"1": 0, "2": 1, "3": 2, "4": 3, "5": 4}
    assert data.labels_line == "labels by number from 1: 5 of 5 folders"


def test_case_7_names_are_ordered_as_timms_reader_orders_them(tmp_path: Path) -> None:
    reader = pytest.importorskip("timm.data.readers.reader_image_folder")
    names = ("Zebra", "apple", "img2", "img10", "Img1")
    folders(tmp_path, *names, each=1)
    model = timm_model("vit_tiny_patch16_224", num_classes=5)
    _, expected = reader.find_images_and_targets(str(tmp_path))
    data = opened(tmp_path, model)
    assert by_folder(data) == expected
    assert data.labels_line is not None
    assert data.labels_line.startswith("labels by order: 5 of 5 folders (apple, Img1, img2, …)")


def test_case_7_names_are_ordered_as_torchvision_orders_them_for_other_models(
    tmp_path: Path,
) -> None:
    torchvision = pytest.importorskip("torchvision")
    folders(tmp_path, "Zebra", "apple", "img2", "img10", "Img1", each=1)
    expected = torchvision.datasets.ImageFolder(str(tmp_path)).class_to_idx
    assert by_folder(opened(tmp_path, unnamed())) == expected


def test_no_order_is_guessed_where_there_are_more_or_fewer_folders(tmp_path: Path) -> None:
    folders(tmp_path, "Zebra", "apple", "pear")
    data = opened(tmp_path, unnamed())
    assert set(by_folder(data).values()) == {-1}
    assert data.labels_line is not None
    assert "none of 3 folders (Zebra, apple, pear) is counted" in data.labels_line
    (tmp_path / "fig").mkdir()  # classes without pictures have their place, too
    (tmp_path / "lime").mkdir()
    assert by_folder(opened(tmp_path, unnamed())) == {"Zebra": 0, "apple": 1, "pear": 4}


@pytest.mark.parametrize("batch_size", [1, 8, 32])
@pytest.mark.parametrize("missing", [None, -1, 7])
def test_case_8_a_missing_label_costs_one_image(missing: int | None, batch_size: int) -> None:
    numbers: list[int | None] = [i % 5 for i in range(40)]
    numbers[3] = numbers[17] = missing
    rows = [{"image": grey(i), "label": number} for i, number in enumerate(numbers)]
    data = opened(rows, unnamed(), batch_size=batch_size)
    found = [b.labels.tolist() for b in data.batches() if b.labels is not None]
    expected = [-1 if i in (3, 17) else i % 5 for i in range(40)]
    kept = [n for part in found for n in part]
    assert kept == ([n for n in expected if n >= 0] if batch_size == 1 else expected)
    assert data.labels_line is not None
    assert "2 images " in data.labels_line
    assert data.labels_line.endswith("not counted")


def test_tables_with_missing_labels_of_every_type() -> None:
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": encoded(grey(i)), "path": None} for i in range(4)]
    columns: list[tuple[Any, Sequence[Any]]] = [
        (datasets.Value("int64"), [1, None, -1, 0]),
        (datasets.Value("float64"), [1.0, None, float("nan"), 0.0]),
        (datasets.ClassLabel(names=["a", "b"]), [1, None, -1, 0]),
        (datasets.Value("string"), ["b", None, "", "a"]),
    ]
    for kind, values in columns:
        features = datasets.Features({"image": datasets.Image(), "label": kind})
        rows = datasets.Dataset.from_dict({"image": cells, "label": values}, features=features)
        for how in ({"label_column": "label"}, {}):
            data = opened(rows, named("a", "b", "c"), **how)
            assert labels(data) == [1, -1, -1, 0]
            told = data.description()["labels"]
            assert (told["counted"], told["not_counted"]) == (2, {"no label": 2})


@pytest.mark.parametrize("values", [[0.5, 1.0, 2.0, 0.0], [1.0, float("inf"), 0.0, 0.0]])
def test_labels_that_are_fractions_are_not_used_and_that_is_said(values: Sequence[float]) -> None:
    """The values of regression; a column that is asked for is refused."""
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": encoded(grey(i)), "path": None} for i in range(4)]
    features = datasets.Features({"image": datasets.Image(), "target": datasets.Value("float32")})
    rows = datasets.Dataset.from_dict({"image": cells, "target": values}, features=features)
    with pytest.warns(blockfit.BlockfitWarning, match="labels are fractions and are not used"):
        assert labels(images(rows, preprocessing=PIXELS)) is None
    with pytest.raises(blockfit.BlockfitError, match="a label is a whole number"):
        images(rows, preprocessing=PIXELS, label_column="target")


def test_a_tables_own_numbers_count_where_the_model_has_no_names() -> None:
    data = opened(table(), unnamed(3))
    assert labels(data) == [0, 1, 2, 0, 1, 2]  # bee, ant, fly: the column's order, not the texts'
    assert data.labels_line == "labels by number"
    assert labels(opened(table(), named("fly", "ant", "bee", "cow"))) == [2, 1, 0, 2, 1, 0]


def test_models_without_a_head_have_no_classes_to_match() -> None:
    model = tiny("ViTModel")  # its config says two classes, as all of transformers do
    matching = match(["x", "y", "z"], model, unit="folders")
    assert matching == Matching("order", ["x", "y", "z"], {0: 0, 1: 1, 2: 2}, None, ["x", "y", "z"],
                                None, "folders") or matching.by is None  # fmt: skip
    assert matching.fits(3)
    assert not matching.fits(2)


def test_case_9_a_stray_picture_is_named_and_left_out(tmp_path: Path) -> None:
    folders(tmp_path, "ant", "bee")
    (tmp_path / "stray.png").write_bytes(encoded(grey(9)))
    data = opened(tmp_path, named(*ANIMALS))
    assert by_folder(data) == {"ant": 0, "bee": 1}
    stray = str(tmp_path / "stray.png")
    assert data.description()["left_out"] == {stray: "beside the class folders"}
    assert data.description()["total"] == 4


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val", "unlabelled"),
        ("Train", "TEST"),
        ("train2017", "val2017"),
        ("training_set", "test_set", "notes"),
        ("train", "dev"),
    ],
    ids=str,
)
def test_case_9_splits_are_no_classes(names: tuple[str, ...], tmp_path: Path) -> None:
    folders(tmp_path, *names)
    done = run("evaluate", "demo", "--images", tmp_path)
    assert done.code == 2
    assert f"holds the splits {', '.join(sorted(names))}; give one of them" in done.error
    assert len(opened(f"{tmp_path}:{names[0]}", None)) == 2


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    folders(tmp_path, "train", "truck", "unlabelled_things")
    assert by_folder(opened(tmp_path, None)).keys() == {"train", "truck", "unlabelled_things"}


def test_the_only_split_is_taken_as_it_is(tmp_path: Path) -> None:
    folders(tmp_path / "train", "ant", "bee")
    assert by_folder(opened(tmp_path, named("bee", "ant"))) == {"ant": 1, "bee": 0}


def test_how_labels_were_matched_is_told_by_the_command(tmp_path: Path) -> None:
    """Case 6 on the command line, for people and as JSON."""
    folders(tmp_path, *map(str, range(10)), "background")
    done = run("evaluate", "demo", "--images", tmp_path)
    line = 'labels by number; 2 images of "background" not counted'
    assert line in done.err
    assert "On 22 images, 20 of them labelled" in done.out
    told = run("evaluate", "demo", "--images", tmp_path, "--json").json
    assert told["compressed"]["labelled"] == 20
    (data,) = told["data"]
    assert data["labels"]["line"] == line


def test_an_accuracy_with_a_class_too_many_is_that_of_the_others(tmp_path: Path) -> None:
    """Case 6: what the model itself says of the pictures is the truth."""
    model = tiny("ViTForImageClassification", id2label=dict(enumerate(ANIMALS)))
    from blockfit.evaluation.evaluate import evaluate

    pictures = torch.randn(30, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        guesses = model(pictures).logits.argmax(1)
    names = ["zoo", *reversed(ANIMALS)]
    own = torch.tensor([names.index(ANIMALS[i]) for i in guesses.tolist()])
    own[:3] = 0  # a class that the model does not have
    items = [(picture, int(label)) for picture, label in zip(pictures, own, strict=True)]
    source = type("Set", (list,), {"classes": names})(items)
    found = evaluate(model, images(source, model, batch_size=7), measure=False).compressed
    assert (found.top1, found.labelled) == (1.0, 27)


def of_several() -> list[Any]:
    """Sources whose labels are lists or arrays of numbers."""
    from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value

    cells = [{"bytes": encoded(grey(n)), "path": None} for n in range(6)]
    rows = {"image": cells, "labels": [[n, 0] for n in range(6)]}
    kinds = [Sequence(ClassLabel(num_classes=6)), Sequence(Value("int64"))]
    tables = [Dataset.from_dict(rows, Features(image=Image(), labels=k)) for k in kinds]
    pixels = torch.rand(6, 3, 8, 8)
    hot = torch.eye(6)
    loaders = [DataLoader(TensorDataset(pixels, h), batch_size=3) for h in (hot, hot.long())]
    return [*tables, tables[0].to_iterable_dataset(), [*zip(pixels, hot, strict=True)], *loaders]


@pytest.mark.parametrize("source", range(6))
def test_labels_of_several_values_are_not_used_and_that_is_said(source: int) -> None:
    def told_of() -> Images:
        found = images(of_several()[source], preprocessing=None if source > 2 else PIXELS)
        assert next(found.batches()).labels is None
        return found

    with pytest.warns(blockfit.BlockfitWarning, match="several values per image"):
        found = told_of()
    assert found.labels_line is None


def test_the_command_says_that_labels_of_several_values_are_not_used(tmp_path: Path) -> None:
    table = tmp_path / "several.parquet"
    of_several()[0].to_parquet(table)
    told = run("compress", "demo", "--images", table, "--remove", 1, "-o", tmp_path / "small")
    assert "several values per image" in told.err
