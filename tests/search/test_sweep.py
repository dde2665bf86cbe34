"""The frontier: written size by size, resumed after a stop, turned into models without images."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockfit
from blockfit.fit.intervals import drop_above
from blockfit.search.budget import Budget
from blockfit.search.span_search import Search
from blockfit.search.sweep import MARK, from_sweep, parts_of_sweep, read_sweep, sweep


@pytest.fixture(scope="module")
def model():
    return blockfit.load("demo")


@pytest.fixture(scope="module")
def images(model):
    return small_part(blockfit.images("digits", model, limit=40, seed=0))


def small_part(images):
    """The same, and 128 images beyond."""
    return dataclasses.replace(images, beyond=images.beyond[:128])


@pytest.fixture(scope="module")
def folder(model, images, tmp_path_factory):
    target = tmp_path_factory.mktemp("sweep") / "all"
    sweep(model, images, target, cuts="blocks")
    return target


@pytest.fixture(scope="module")
def timed(folder, model, images, tmp_path_factory):
    target = tmp_path_factory.mktemp("timed") / "all"
    shutil.copytree(folder, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Search, "solved", never)
        sweep(model, images, target, cuts="blocks", latency_images=2)
    return target


def never(*_):
    raise AssertionError("a finished sweep is not run again")


def test_every_size_from_one_block_to_all_but_two_is_there(folder):
    frontier = read_sweep(folder)
    assert [point["removed"] for point in frontier.points] == list(range(1, 11))


def test_no_budget_gets_a_worse_plan_than_a_larger_one(folder):
    frontier = read_sweep(folder)
    losses = [frontier.best(Budget("remove", n)).held_out.loss for n in range(1, 11)]
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


def test_top1_is_that_of_the_held_out_images(folder, model, images):
    batches = list(images.split(0.2, 0)[1].batches())
    labels = torch.cat([batch.labels for batch in batches])

    def top1(of):
        with torch.no_grad():
            guesses = torch.cat([of(batch.inputs).argmax(1) for batch in batches])
        return float((guesses == labels).float().mean())

    result = from_sweep(folder, Budget("remove", 8))
    assert result.report["top1_before"] == pytest.approx(top1(model))
    assert result.report["top1_after"] == pytest.approx(top1(result.model))
    stored = read_sweep(folder).data
    assert stored["original"]["top1"] == result.report["top1_before"]
    assert result.report["top1_after"] in [point["top1"] for point in stored["points"]]


def test_a_drop_budget_takes_the_last_plan_up_to_which_all_bounds_keep_it(folder):
    points = read_sweep(folder).points
    bounds = []
    for point in points:
        judged = point["judged"]
        assert judged["images"] == judged["labelled"] == point["final"]["images"] == 64
        assert judged["apart"]
        bounds.append(100 * drop_above(judged["worse"], judged["better"], 64))
    for budget in (5.0, 12.0, 60.0):
        size = next((n for n, bound in enumerate(bounds) if bound > budget), len(bounds))
        best = read_sweep(folder).best(Budget("max_drop", budget))
        assert best.removed == size
    report = from_sweep(folder, Budget("max_drop", 12.0)).report
    assert report["judged"]["bound"] <= 12.0
    assert report["final"]["top1_after"]["low"] < report["final"]["top1_after"]["value"]


def test_a_drop_that_the_sweeps_images_cannot_show_is_refused(folder, model):
    with pytest.raises(
        blockfit.BlockfitError,
        match=r"64 images .* cannot show max_drop 0\.5: removing 1 block costs 0",
    ):
        from_sweep(folder, Budget("max_drop", 0.5), model)
    forced = from_sweep(folder, Budget("max_drop", 0.5), model, force_budget=True).report
    assert "is kept by what 64 images say" in forced["warnings"][-1]


def test_the_figures_of_a_sweep_are_of_images_that_chose_nothing(folder, model, images):
    """Its final figures are those of the model that is made from it."""
    result = from_sweep(folder, Budget("remove", 9), model)
    final = parts_of_sweep(images, None, 0).final
    labels = torch.cat([batch.labels for batch in final.batches()])
    with torch.no_grad():
        guesses = torch.cat([result.model(batch).argmax(1) for batch in final])
    right = float((guesses == labels).double().mean())
    assert result.report["final"]["top1_after"]["value"] == pytest.approx(right)
    assert not {*final.positions.tolist()} & {*images.positions.tolist()}


def test_a_finished_sweep_is_timed_from_what_it_wrote(folder, timed, model, images):
    points = read_sweep(timed).points
    for point, untimed in zip(points, read_sweep(folder).points, strict=True):
        found = point["latency"]
        assert untimed == {key: value for key, value in point.items() if key != "latency"}
        assert 0 < found["low"] <= found["ratio"] <= found["high"]
        assert (found["batch_size"], found["threads"]) == (2, torch.get_num_threads())
    assert points[-1]["latency"]["ratio"] < 0.8  # two of twelve blocks are left
    written = (timed / MARK).read_bytes()
    sweep(model, images, timed, cuts="blocks", latency_images=2)
    assert (timed / MARK).read_bytes() == written  # nothing was timed twice


def test_a_latency_budget_takes_the_best_plan_that_is_fast_enough(timed):
    frontier = read_sweep(timed)
    ratio = frontier.points[-1]["latency"]["ratio"]
    best = frontier.best(Budget("latency", min(1.0, ratio + 1e-9)))
    assert best.latency.ratio <= ratio
    assert from_sweep(timed, Budget("latency", 1.0)).report["latency"]["batch_size"] == 2
    with pytest.raises(blockfit.BlockfitError, match=r"no plan of the sweep .* meets latency"):
        frontier.best(Budget("latency", 0.01))


def test_what_a_sweep_does_not_know_is_said_with_what_to_do(folder, timed, tmp_path):
    data = json.loads((timed / MARK).read_text())
    del data["original"]["top1"]  # as earlier versions wrote it
    for point in data["points"]:
        for key in ("top1", "latency", "repaired_blocks", "judged", "final"):
            del point[key]
        point["held_out"] |= {"kl": None, "agreement": None}
    (tmp_path / MARK).write_text(json.dumps(data))
    frontier = read_sweep(tmp_path)
    for kind, message in (
        ("latency", "holds no latencies; give the same sweep again with latency_images=1"),
        ("max_drop", "holds no accuracy that was judged apart; sweep labelled images"),
        ("max_kl", "holds no KL that was judged apart: the model has no head"),
    ):
        with pytest.raises(blockfit.BlockfitError, match=message):
            frontier.best(Budget(kind, 1.0))
    assert frontier.best(Budget("remove", 3)).removed >= 3


@pytest.mark.parametrize(
    ("place", "key", "value", "message"),
    [
        ("original", "top1", 1.5, "original: top1 must be between 0 and 1"),
        ("point", "top1", "high", "top1 must be a number"),
        ("point", "top1", -0.1, "top1 must be between 0 and 1"),
        ("point", "latency", {"ratio": 0.5}, "latency: key .* is missing"),
        ("latency", "ratio", 0.0, "latency: ratio must be above 0"),
        ("latency", "threads", 0, "latency: threads must be above 0"),
        ("latency", "more", 1, "unknown key .*more"),
    ],
)
def test_figures_that_cannot_be_are_refused(timed, tmp_path, place, key, value, message):
    data = json.loads((timed / MARK).read_text())
    point = data["points"][0]
    {"original": data["original"], "point": point, "latency": point["latency"]}[place][key] = value
    (tmp_path / MARK).write_text(json.dumps(data))
    with pytest.raises(blockfit.BlockfitError, match=message):
        read_sweep(tmp_path)


def test_a_model_from_a_sweep_tells_where_it_is_from(folder):
    report = from_sweep(folder, Budget("remove", 3)).report
    assert report["sweep"] == str(folder)
    small = [point for point in read_sweep(folder).points if point["removed"] >= 3]
    best = min(small, key=lambda point: point["held_out"]["kl"])
    assert report["repaired_blocks"] == best["repaired_blocks"]
    assert report["calibration"]["drawn"] == 40


def test_a_sweep_of_another_number_of_images_is_another_sweep(folder, model):
    more = small_part(blockfit.images("digits", model, limit=48, seed=0))
    with pytest.raises(blockfit.BlockfitError, match="another calibration"):
        sweep(model, more, folder, cuts="blocks")


def test_a_sweep_of_single_spans_reaches_every_size(model, images, tmp_path):
    frontier = sweep(model, images, tmp_path / "paper", cuts="blocks", recipe="paper")
    assert [[e["stop"] - e["start"] for e in p["plan"]] for p in frontier.points] == [
        [size] for size in range(1, 11)
    ]


def test_a_parameter_budget_is_met_by_the_best_plan_that_fits(folder):
    frontier = read_sweep(folder)
    point = frontier.best(Budget("params", 0.7))
    assert point.parameters <= 0.7 * frontier.data["original"]["parameters"]
    with pytest.raises(blockfit.BlockfitError, match="no plan"):
        frontier.best(Budget("params", 0.02))


def test_a_stopped_sweep_goes_on_and_ends_as_an_unbroken_one(folder, model, images, tmp_path):
    target = tmp_path / "stopped"
    solved = Search.solved

    def stops(self, size):  # type: ignore[no-untyped-def]
        if size == 4:
            raise KeyboardInterrupt
        return solved(self, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Search, "solved", stops)
        with pytest.raises(KeyboardInterrupt):
            sweep(model, images, target, cuts="blocks")
    assert [p["removed"] for p in read_sweep(target).points] == [1, 2, 3]
    asked = []

    def counts(self, size, fits=None):  # type: ignore[no-untyped-def]
        asked.append(size)
        return solved(self, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Search, "solved", counts)
        sweep(model, images, target, cuts="blocks")
    assert asked == list(range(4, 11))
    unbroken, resumed = read_sweep(folder), read_sweep(target)
    for left, right in zip(unbroken.points, resumed.points, strict=True):
        assert left["plan"] == right["plan"]
        one, two = load_file(folder / left["file"]), load_file(target / right["file"])
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_folder_of_another_sweep_is_refused(folder, model, images):
    with pytest.raises(blockfit.BlockfitError, match="another seed"):
        sweep(model, images, folder, cuts="blocks", seed=7)


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
