"""The page: one file, nothing fetched, accessible, and texts from files are nothing but text."""

from __future__ import annotations

import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from commandline import blockfit_command
from PIL import Image
from reports import made as made
from reports import runs as runs

from blockfit.errors import BlockfitError
from blockfit.reports.page import check_report, render, write_report
from blockfit.reports.runs import read_run, read_runs


class Page(HTMLParser):
    """All elements of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data

    def of(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


@pytest.fixture(scope="module")
def page(made: Path) -> Page:
    return Page((made / "page.html").read_text(encoding="utf-8"))


def test_the_page_is_one_small_file_that_asks_for_nothing(made: Path, page: Page) -> None:
    assert (made / "page.html").stat().st_size < 5_000_000
    for attributes in page.of(
        "img", "script", "link", "iframe", "source", "object", "image", "use"
    ):
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            value = attributes.get(name) or ""
            assert not value or value.startswith(("data:", "#"))
    policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe-inline" not in policy.partition("script-src")[2]
    assert "url(http" not in (made / "page.html").read_text(encoding="utf-8")


def test_pictures_tables_and_controls_have_their_words(page: Page) -> None:
    assert all(image.get("alt") for image in page.of("img"))
    assert all(cell.get("scope") for cell in page.of("th"))
    counts = Counter(tag for tag, _ in page.elements)
    assert counts["table"] == counts["caption"] > 10
    assert counts["h1"] == 1
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        if attributes.get("role") in ("img", "radio", "group", "region"):
            assert attributes.get("aria-label")
        if named := attributes.get("aria-labelledby"):
            assert named in ids
    for link in page.of("a"):
        assert (link["href"] or "").removeprefix("#") in ids


def test_the_page_says_what_the_runs_say(runs: dict[str, Path], page: Page) -> None:
    points = json.loads((runs["sweep"] / "sweep.json").read_text())["points"]
    for point in points:
        assert f"{point['held_out']['kl']:.4f}" in page.words
        assert f"{point['maps'][0]['patch']:.4f}" in page.words
    assert "blockfit compress --from" in page.words
    assert "40 of 1198 from digits" in page.words
    assert "The licence of the weights" not in page.words
    assert "MIT" in page.words
    assert "Accuracy, speed and memory on test images" in page.words


def test_what_a_run_does_not_know_is_left_out_with_a_word(runs: dict[str, Path]) -> None:
    alone = Page(render(read_run(runs["thin"])))
    assert "only the original" in alone.words
    sections = {attributes.get("id") for attributes in alone.of("section")}
    assert sections == {"similarity", "provenance", "glossary", "missing", "warnings"}
    assert "The licence of the weights: the checkpoint does not say." in alone.words
    whole = Page(render(read_runs([runs["small"], runs["evaluation.json"], runs["thin"]])))
    told = json.loads(runs["evaluation.json"].read_text())
    assert f"{told['compressed']['top1']:.2%}" in whole.words
    assert f"{told['compressed']['images_per_second']:.1f}" in whole.words
    assert "What both models say of single images" in whole.words


def test_texts_from_files_stay_texts(made: Path) -> None:
    page = Page((made / "hostile.html").read_text(encoding="utf-8"))
    assert len(page.of("script")) == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not [image for image in page.of("img") if image["src"] == "x"]
    assert page.words.count("<script>window.hacked=1</script>") >= 16
    numbers = [attributes for attributes in page.of("b") if attributes]
    assert numbers == []
    assert len(page.of("b")) == 8  # one per kept block


def test_an_existing_file_is_replaced_only_if_it_is_a_report(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    content = read_run(runs["small"])
    write_report(content, tmp_path / "new" / "report.html")
    write_report(content, tmp_path / "new" / "report.html")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
    diary = tmp_path / "diary.html"
    diary.write_text("mine")
    for path, message in ((diary, "was not written by blockfit"), (tmp_path, "is a folder")):
        with pytest.raises(BlockfitError, match=message):
            check_report(path)
    assert diary.read_text() == "mine"


def test_every_plot_is_written_as_png_and_svg(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    done = blockfit_command(
        "report", runs["small"], "-o", tmp_path / "r.html", "--pictures", folder, "--json"
    )
    assert sorted(done.json["pictures"]) == sorted(map(str, folder.iterdir()))
    assert {path.stem for path in folder.iterdir()} == {"chain", "map-errors"}
    for path in folder.glob("*.png"):
        assert Image.open(path).size[0] > 600
    for path in folder.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")  # noqa: S314 - our own


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("no/such/run",), "no/such/run does not exist; give a folder"),
        (("{small}", "--against", "demo"), "--against and --images go together"),
        (("{small}", "--remove", "3"), "--remove has no use without"),
        (("{analysis}", "--against", "demo", "--images", "digits"), "there is no small model"),
        (("{small}", "-o", "{small}"), "is a folder; give a file to write"),
    ],
)
def test_a_refused_report_says_one_sentence(
    runs: dict[str, Path], tmp_path: Path, given: tuple[str, ...], message: str
) -> None:
    words = [word.format(**{k: v for k, v in runs.items() if "." not in k}) for word in given]
    where = () if "-o" in words else ("-o", tmp_path / "r.html")
    assert message in blockfit_command("report", *words, *where).error
    assert not (tmp_path / "r.html").exists()


def test_commands_end_with_a_report_where_one_is_asked_for(tmp_path: Path) -> None:
    few = ("--images", "digits", "--limit", "40")
    for command in (
        ("compress", "demo", *few, "--span", "9:11", "-o", tmp_path / "small"),
        ("analyze", "demo", *few),
    ):
        file = tmp_path / f"{command[0]}.html"
        done = blockfit_command(*command, "--report", file)
        assert f"report in {file}" in done.out
        page = Page(file.read_text(encoding="utf-8"))
        sections = {attributes.get("id") for attributes in page.of("section")}
        wanted = {"similarity", "provenance"}
        if command[0] == "compress":
            wanted |= {"summary", "chain", "errors", "states", "samples", "pca"}
        assert wanted <= sections
    taken = tmp_path / "taken.html"
    taken.write_text("mine")
    refused = blockfit_command("demo", "--report", taken)
    assert "was not written by blockfit" in refused.error
