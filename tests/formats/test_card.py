"""Model cards: where a model comes from, its plan as a picture, how it was made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from commandline import blockfit_command
from exporting import prepared, saved, uniform
from families import one_thread as one_thread

from blockfit.errors import BlockfitError
from blockfit.fit.plan import Narrowing, Plan, Replacement, Span
from blockfit.formats.card import Origin, model_card, picture
from blockfit.formats.parity import Parity

hub = pytest.importorskip("huggingface_hub")
PARITY = Parity(16, "/home/me/photos", 1e-6, 3.0, 1.0)


def test_the_plan_is_a_picture_with_a_line_per_block() -> None:
    cuts = (Narrowing(0, "mlp", 16, 64), Narrowing(3, "mlp", 64, 128))
    plan = Plan((Replacement(Span(1, 2), "affine"),), cuts)
    assert picture(plan, 4).splitlines() == [
        "block  mlp",
        "    0  ██░░░░░░░░ 25%",
        "    1  – affine",
        "    2  ██████████ 100%",
        "    3  █████░░░░░ 50%",
    ]
    whole = picture(Plan((Replacement(Span(1, 3), "folded"),)), 3).splitlines()
    assert whole == ["block  kept", "    0  ██████████ 100%", "    1  – folded", "    2  – folded"]


def test_the_card_says_what_the_user_says_of_the_original() -> None:
    small = uniform("vit-classifier", 0.5, (), prepared(32))
    told = model_card(small, PARITY, "load()", origin=Origin("me/vit.base", "MIT"))
    card = hub.ModelCard(told)
    assert card.data.base_model == "me/vit.base"
    assert card.data.license == "mit"
    assert "Made from me/vit.base (licence: MIT)" in card.text
    plain = hub.ModelCard(model_card(small, PARITY, "load()"))
    assert plain.data.base_model is None
    assert "does not state a licence" in plain.text


def test_the_card_holds_the_command_without_folders_of_the_machine() -> None:
    small = uniform("vit-classifier", 0.5)

    def card_of(command: str) -> str:
        return model_card(replace(small, report={"command": command}), PARITY, "load()")

    text = card_of("blockfit compress /home/me/vit --images '~/my photos' --params 62% -o ./small")
    assert "blockfit compress vit --images 'my photos' --params 62% -o small" in text
    assert "/home" not in text
    for word, kept in {
        "--images=/home/me/photos": "--images=photos",
        "folder:/home/me/photos": "folder:photos",
        "file:///home/me/photos": "file://photos",
        "--split=../a/b,/home/c": "--split=b,c",
        "hf://datasets/me/photos": "hf://datasets/me/photos",
        "https://some.where/photos.tar": "https://some.where/photos.tar",
        "me/photos": "me/photos",
    }.items():
        assert f"--images {kept}\n" in card_of(f"blockfit compress vit --images {word}")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"base_model": "somewhere"}, "is no repository of the Hub"),
        ({"base_model": "a/b/c"}, "is no repository of the Hub"),
        ({"license": " "}, "names no licence"),
        ({"license": "mit\nbase_model: other/one"}, "names no licence"),
    ],
)
def test_what_is_no_name_is_refused(given: dict[str, str], sentence: str) -> None:
    with pytest.raises(BlockfitError, match=sentence):
        Origin(**given)


def test_the_command_writes_them_for_folders_and_refuses_them_for_files(tmp_path: Path) -> None:
    saved(tmp_path / "small", "timm-vit", preprocessing=prepared(32))
    told = ("--base-model", "me/tiny", "--license", "apache-2.0")
    command = ("export", tmp_path / "small", "-o")
    assert blockfit_command(*command, tmp_path / "plain", "--plain", *told).code == 0
    data = hub.ModelCard.load(tmp_path / "plain" / "README.md").data
    assert (data.base_model, data.license) == ("me/tiny", "apache-2.0")
    refused = blockfit_command(*command, tmp_path / "x.pt2", "--pt2", *told)
    assert refused.code == 2
    assert "--plain and --hub only" in refused.error
    wrong = blockfit_command(*command, tmp_path / "other", "--plain", "--base-model", "tiny")
    assert wrong.code == 2
    assert "--base-model" in wrong.error
