"""The frontier: written size by size, resumed after a stop, turned into models without images."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockfit
from blockfit.budget import Budget
from blockfit.search import Search
from blockfit.sweep import MARK, from_sweep, loss_of, read_sweep, sweep


@pytest.fixture(scope="module")
def model():
    return blockfit.load("demo")


@pytest.fixture(scope="module")
def images(model):
    return blockfit.images("digits", model, limit=40, seed=0)


@pytest.fixture(scope="module")
def folder(model, images, tmp_path_factory):
    target = tmp_path_factory.mktemp("sweep") / "all"
    sweep(model, images, target)
    return target


def test_every_size_from_one_block_to_all_but_two_is_there(folder):
    frontier = read_sweep(folder)
    assert [point["removed"] for point in frontier.points] == list(range(1, 11))


def test_no_budget_gets_a_worse_plan_than_a_larger_one(folder):
    frontier = read_sweep(folder)
    losses = [loss_of(frontier.best(Budget("remove", n))) for n in range(1, 11)]
    assert losses == sorted(losses)


def test_a_model_is_made_without_images_and_has_the_written_figures(folder, model, images):
    result = from_sweep(folder, Budget("remove", 3))
    assert sum(p.numel() for p in result.model.parameters()) == result.report["parameters_after"]
    _, held_out = images.split(0.2, 0)
    with torch.no_grad():
        p = torch.cat([model(x) for x in held_out]).log_softmax(1)
        q = torch.cat([result.model(x) for x in held_out]).log_softmax(1)
    kl = float((p.exp() * (p - q)).sum(1).mean())
    assert result.report["held_out"]["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-7)


def test_a_model_from_a_sweep_tells_where_it_is_from(folder):
    report = from_sweep(folder, Budget("remove", 3)).report
    assert report["sweep"] == str(folder)
    assert report["repaired_blocks"] == read_sweep(folder).points[2]["repaired_blocks"]
    assert report["calibration"]["drawn"] == 40


def test_a_sweep_of_another_number_of_images_is_another_sweep(folder, model):
    more = blockfit.images("digits", model, limit=48, seed=0)
    with pytest.raises(blockfit.BlockfitError, match="another calibration"):
        sweep(model, more, folder)


def test_a_sweep_of_single_spans_reaches_every_size(model, images, tmp_path):
    frontier = sweep(model, images, tmp_path / "paper", recipe="paper")
    assert [[e["stop"] - e["start"] for e in p["plan"]] for p in frontier.points] == [
        [size] for size in range(1, 11)
    ]


def test_a_parameter_budget_is_met_by_the_best_plan_that_fits(folder):
    frontier = read_sweep(folder)
    point = frontier.best(Budget("params", 0.7))
    assert point["parameters"] <= 0.7 * frontier.data["original"]["parameters"]
    with pytest.raises(blockfit.BlockfitError, match="no plan"):
        frontier.best(Budget("params", 0.001))


def test_a_stopped_sweep_goes_on_and_ends_as_an_unbroken_one(folder, model, images, tmp_path):
    target = tmp_path / "stopped"
    solved = Search.solved

    def stops(self, size, fits=None):  # type: ignore[no-untyped-def]
        if size == 4:
            raise KeyboardInterrupt
        return solved(self, size, fits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Search, "solved", stops)
        with pytest.raises(KeyboardInterrupt):
            sweep(model, images, target)
    assert [p["removed"] for p in read_sweep(target).points] == [1, 2, 3]
    asked = []

    def counts(self, size, fits=None):  # type: ignore[no-untyped-def]
        asked.append(size)
        return solved(self, size, fits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Search, "solved", counts)
        sweep(model, images, target)
    assert asked == list(range(4, 11))
    unbroken, resumed = read_sweep(folder), read_sweep(target)
    for left, right in zip(unbroken.points, resumed.points, strict=True):
        assert left["plan"] == right["plan"]
        one, two = load_file(folder / left["file"]), load_file(target / right["file"])
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_folder_of_another_sweep_is_refused(folder, model, images):
    with pytest.raises(blockfit.BlockfitError, match="another seed"):
        sweep(model, images, folder, seed=7)


def test_another_model_is_refused(folder):
    other = blockfit.load("demo")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(blockfit.BlockfitError, match="not the one"):
        from_sweep(folder, Budget("remove", 1), other)


@pytest.mark.parametrize("damage", ["json", "keys", "tensor", "missing", "format"])
def test_damaged_sweeps_are_refused_with_one_sentence(folder, tmp_path, damage):
    target = tmp_path / "damaged"
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    mark = target / MARK
    data = json.loads(mark.read_text())
    first = target / data["points"][0]["file"]
    if damage == "json":
        mark.write_text("{")
    elif damage == "keys":
        mark.write_text(json.dumps(data | {"extra": 1}))
    elif damage == "format":
        mark.write_text(json.dumps(data | {"format": 99}))
    elif damage == "missing":
        first.unlink()
    else:
        tensors = load_file(first)
        name = next(n for n in tensors if n.startswith("maps."))
        tensors[name] = tensors[name][:1].clone()
        save_file(tensors, first)
    with pytest.raises(blockfit.BlockfitError):
        from_sweep(target, Budget("remove", 1))


def test_a_folder_without_a_sweep_is_refused(tmp_path):
    with pytest.raises(blockfit.BlockfitError, match="no sweep folder"):
        read_sweep(tmp_path)
