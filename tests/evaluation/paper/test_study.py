"""``blockfit reproduce``: every file is written, what is done is kept, bad input is refused."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from commandline import Done, blockfit_command
from families import one_thread as one_thread
from PIL import Image

from blockfit.errors import BlockfitError
from blockfit.evaluation.paper import setup
from blockfit.evaluation.paper import study as reproduce
from blockfit.evaluation.paper.lab import QUICK, Lab, Row
from blockfit.evaluation.paper.study import ENDINGS, INDEX, MARK
from blockfit.models.demo import digits
from blockfit.reports.runs import read_run

NAMES = tuple(reproduce.BY_NAME)
TINY = ("--limit", "40", "--samples", "20,40", "--test-limit", "50", "--quick")


def run(folder: Path, *more: str | Path) -> Done:
    return blockfit_command("reproduce", "--model", "demo", *more, "-o", folder)


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the experiments that are run from now on."""
    ran: list[str] = []

    def counted(experiment: reproduce.Experiment) -> reproduce.Experiment:
        def noted(lab: Lab) -> list[Row]:
            ran.append(experiment.name)
            return experiment.run(lab)

        return dataclasses.replace(experiment, run=noted)

    every = tuple(counted(e) for e in reproduce.EXPERIMENTS)
    monkeypatch.setattr(reproduce, "EXPERIMENTS", every)
    monkeypatch.setattr(reproduce, "BY_NAME", {e.name: e for e in every})
    return ran


@pytest.fixture(scope="module", autouse=True)
def few_steps() -> object:
    """Trained translators take long, and what they learn is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        quick = dataclasses.replace(QUICK, steps=3, compared=(1, 2), starts=2)
        patch.setattr(setup, "QUICK", quick)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """The demo model with all experiments."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("reproduce")
    other = folder / "other.npy"
    pictures = (digits("calibration")[0][:40, 0] + 1) * 8 * 15.9
    np.save(other, np.rot90(pictures.numpy().astype(np.uint8), axes=(1, 2)))
    out = folder / "reproduction"
    page = ("--report", folder / "page.html")
    return out, run(out, "--data", "digits", *TINY, "--transfer", other, *page, "--json")


def test_every_experiment_writes_its_table_its_numbers_and_its_picture(
    whole: tuple[Path, Done],
) -> None:
    folder, done = whole
    told = done.json
    assert told.pop("output") == str(folder)
    assert told.pop("seconds") > 0
    test, calibration = told.pop("data")
    assert (test["source"], test["used"]) == ("digits:test", 50)
    assert calibration["labels"]["by"] == "number"
    assert json.loads((folder / MARK).read_text()) == told
    assert tuple(told["experiments"]) == NAMES
    wanted = {f"{name}{end}" for name in NAMES for end in ENDINGS} | {MARK, INDEX}
    assert {path.name for path in folder.iterdir()} == wanted
    for name in NAMES:
        rows = told["experiments"][name]["rows"]
        with (folder / f"{name}.csv").open(newline="") as file:
            read = list(csv.DictReader(file))
        assert len(read) == len(rows)
        if name != "similarity":
            assert [float(row["top1"]) for row in read] == [row["top1"] for row in rows]
            assert rows[0]["map"] == "original"
            assert rows[0]["top1"] > 0.9
        page = (folder / f"{name}.md").read_text()
        assert f"({name}.png)" in page
        assert told["experiments"][name]["finding"] in page
    index = (folder / INDEX).read_text()
    assert all(f"[{e.title}]({e.name}.md)" in index for e in reproduce.EXPERIMENTS)
    assert "test images: 50 of digits:test" in index
    assert told["about"]["judge"] == "head (the model's own)"


def test_a_report_shows_every_experiment_with_its_finding_rows_and_picture(
    whole: tuple[Path, Done], tmp_path: Path
) -> None:
    folder, done = whole
    told = done.json["experiments"]
    shown = read_run(folder).experiments
    assert [one.title for one in shown] == [reproduce.BY_NAME[name].title for name in told]
    for one, (name, entry) in zip(shown, told.items(), strict=True):
        assert one.finding == entry["finding"]
        assert len(one.rows) in (len(entry["rows"]), 0)  # 0: more than a page can show
        assert all(len(row) == len(one.header) for row in one.rows)
        drawn = Image.open(folder / f"{name}.png").convert("RGB")
        assert np.array_equal(Image.open(io.BytesIO(one.picture or b"")), drawn)
    spans = shown[NAMES.index("spans")]
    column = spans.header.index("top-1")
    rows = told["spans"]["rows"]
    assert [row[column] for row in spans.rows] == [f"{row['top1']:.2%}" for row in rows]
    page = (folder.parent / "page.html").read_text(encoding="utf-8")
    assert page.count('<div class="scroll chart"') == len(NAMES)
    assert all(entry["finding"] in html.unescape(page) for entry in told.values())
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "spans.png").write_bytes(b"GIF89a")
    with pytest.raises(BlockfitError, match=r"spans\.png is no picture"):
        read_run(copy)
    (copy / "spans.png").unlink()
    (copy / "spans.png").symlink_to(folder / "seeds.png")
    left = read_run(copy).experiments[NAMES.index("spans")]
    assert left.picture is None


@pytest.mark.parametrize("name", [INDEX, "spans.md", "seeds.csv", "positions.png"])
def test_a_file_of_the_user_s_is_never_replaced(
    whole: tuple[Path, Done], tmp_path: Path, name: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole[0], copy)
    if name.endswith((".csv", ".png")):  # of an experiment that was not run there
        data = json.loads((copy / MARK).read_text())
        del data["experiments"][stem := name.partition(".")[0]]
        (copy / MARK).write_text(json.dumps(data))
        for other in (path for path in copy.glob(f"{stem}.*") if path.name != name):
            other.unlink()
    for text in ("my own notes\n", (copy / name).read_bytes().decode("latin-1") + "a line\n"):
        (copy / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(BlockfitError, match=rf"{name} is not as blockfit reproduce writes it"):
            reproduce.earlier(copy)
        assert (copy / name).read_bytes() == text.encode("latin-1")
    (copy / name).unlink()
    assert reproduce.earlier(copy) is not None


def test_what_is_done_is_not_run_again_and_what_was_deleted_is_written_again(
    whole: tuple[Path, Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole[0], folder)
    (folder / "spans.png").unlink()
    (folder / "seeds.csv").unlink()
    ran = count_runs(monkeypatch)
    names = [name for name in NAMES if name != "transfer"]
    done = run(folder, "--data", "digits", *TINY, "--experiments", ",".join(names))
    assert done.code == 0, done.err
    assert ran == []
    assert (folder / "spans.png").is_file()
    assert (folder / "seeds.csv").read_bytes() == (whole[0] / "seeds.csv").read_bytes()
    more = ("--seeds", "2", "--experiments", "seeds,similarity")
    assert run(folder, "--data", "digits", *TINY, *more).code == 0
    assert ran == ["seeds"]
    rows = json.loads((folder / MARK).read_text())["experiments"]["seeds"]["rows"]
    assert all(len(row["each"].split()) == 2 for row in rows)


def test_a_run_that_is_stopped_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = count_runs(monkeypatch)
    folder = tmp_path / "stopped"
    given = ("--data", "digits", *TINY, "--experiments", "similarity,spans")
    stop = monkeypatch.context()
    with stop as patch:
        patch.setattr(Lab, "judged", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(folder, *given).code == 130
    assert ran == ["similarity", "spans"]
    assert list(json.loads((folder / MARK).read_text())["experiments"]) == ["similarity"]
    assert {path.name for path in folder.iterdir()} == {
        MARK, INDEX, *(f"similarity{end}" for end in ENDINGS),
    }  # fmt: skip
    assert "spans" in (folder / INDEX).read_text()
    assert run(folder, *given).code == 0
    assert ran == ["similarity", "spans", "spans"]


def test_a_run_that_is_stopped_at_its_first_table_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, given = tmp_path / "stopped", ("--data", "digits", *TINY, "--experiments", "similarity")

    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "draw", stops)
        assert run(folder, *given).code == 130
    assert (folder / "similarity.csv").is_file()
    assert not (folder / "similarity.md").exists()
    done = run(folder, *given)
    assert done.code == 0, done.err


def test_without_another_source_transfer_is_skipped_and_said_so(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "--data", "digits", *TINY, "--experiments", "transfer")
    assert done.code == 0
    assert "transfer was skipped" in done.err
    assert done.err.count("labels by number") == 1  # of the test images: nothing is fitted here
    assert "--transfer" in done.err


def test_probes_judge_where_asked(tmp_path: Path) -> None:
    given = ("--data", "digits", *TINY, "--experiments", "spans", "--train-limit", "60", "--json")
    for kind in ("probe-fixed", "probe-new"):
        told = run(tmp_path / kind, *given, "--judge", kind).json
        assert told["about"]["judge"].startswith(f"{kind} (a linear probe")
        assert told["about"]["judge"].endswith("60 images")
        assert 0.2 < told["experiments"]["spans"]["rows"][0]["top1"] <= 1


def test_without_matplotlib_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = tmp_path / "out"
    done = run(folder, "--data", "digits", *TINY, "--experiments", "spans")
    assert done.code == 0
    assert "blockfit[plots]" in done.err
    assert {path.name for path in folder.iterdir()} == {MARK, INDEX, "spans.csv", "spans.md"}
    assert "png" not in (folder / INDEX).read_text()


def test_bad_input_is_refused_before_anything_is_loaded(
    whole: tuple[Path, Done], tmp_path: Path
) -> None:
    data = ("--data", "digits")
    assert "unknown experiment 'span'" in run(tmp_path / "a", *data, "--experiments", "span").error
    assert "give --images" in run(tmp_path / "a").error
    assert "not both" in run(tmp_path / "a", *data, "--train", "digits").error
    assert "give --images" in run(tmp_path / "a", "--train", "digits").error
    assert "cannot read --samples" in run(tmp_path / "a", *data, "--samples", "few").error
    assert "seeds must be" in run(tmp_path / "a", *data, "--seeds", "0").error
    assert not (tmp_path / "a").exists()
    (tmp_path / "diary.txt").write_text("mine")
    assert "holds no experiments" in run(tmp_path, *data).error
    assert "is a file" in run(tmp_path / "diary.txt", *data).error
    other = run(whole[0], *data, "--quick", "--test-limit", "30")
    assert other.code == 2
    assert "other test images" in other.err.splitlines()[-1]
    (tmp_path / "diary.txt").rename(tmp_path / MARK)
    assert "is not valid JSON" in run(tmp_path, *data).error
    (tmp_path / MARK).write_text("{}")
    assert "not written by blockfit reproduce" in run(tmp_path, *data).error
