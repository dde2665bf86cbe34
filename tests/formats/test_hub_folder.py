"""Hub folders: read by transformers where blockfit is not, positions of blocks kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from commandline import blockfit_command
from exporting import MAPS, environment, output, prepared, saved
from families import EXPORTED, FAMILIES
from families import one_thread as one_thread
from safetensors.torch import load_file, save_file

import blockfit
from blockfit.errors import BlockfitError
from blockfit.fit.plan import Plan, Replacement, Span
from blockfit.formats.hub_folder import export_hub
from blockfit.models.load import load_model

pytest.importorskip("transformers")

ALONE = """
import importlib.util, sys
assert importlib.util.find_spec("blockfit") is None
import torch, transformers
from safetensors.torch import load_file, save_file
folder, traffic = sys.argv[1:]
images = load_file(traffic + "/in.safetensors")["images"]
auto = transformers.AutoModelForImageClassification
torch.set_grad_enabled(False)
model = auto.from_pretrained(folder, trust_remote_code=True).eval()
out = model(images, output_hidden_states=True)
model.save_pretrained(folder + "-again")
again = auto.from_pretrained(folder + "-again", trust_remote_code=True).eval()
states = {f"state {n}": state.clone() for n, state in enumerate(out.hidden_states)}
found = {"out": out.logits, "again": again(images).logits, **states}
save_file(found, traffic + "/out.safetensors")
"""


@pytest.mark.parametrize("share", [None, 0.5], ids=["maps", "narrowed"])
def test_transformers_alone_reads_it_and_gives_the_same_outputs(
    share: float | None, tmp_path: Path
) -> None:
    small = saved(tmp_path / "small", "dinov2-classifier", MAPS, prepared(32), share)
    assert bool(small.plan.narrowings) == (share is not None)
    done = export_hub(small, tmp_path / "hub")
    assert done.blocks == 2
    assert "AutoModelForImageClassification.from_pretrained" in done.how_to_load
    images = FAMILIES["dinov2-classifier"].images(4, seed=9)
    save_file({"images": images}, tmp_path / "in.safetensors")
    command = [environment(tmp_path / "env"), "-I", "-c", ALONE, done.folder, tmp_path]
    environ = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([str(word) for word in command], check=True, env=environ)
    found = load_file(tmp_path / "out.safetensors")
    small_model: Any = small.model
    with torch.no_grad():
        own = small_model(images, output_hidden_states=True)
    assert len(found) == 2 + len(own.hidden_states) == 2 + 5
    for number, state in enumerate(own.hidden_states):
        assert torch.allclose(found[f"state {number}"], state, atol=1e-5)
    assert torch.allclose(found["out"], own.logits, atol=1e-5)
    assert torch.equal(found["again"], found["out"])


@pytest.mark.parametrize("name", EXPORTED["Hub"])
def test_every_family_is_read_back_with_maps_and_narrowed_layers(name: str, tmp_path: Path) -> None:
    small = saved(tmp_path / "small", name, MAPS, share=0.5)
    assert small.plan.narrowings
    done = export_hub(small, tmp_path / "hub")
    assert done.parity.max_abs_error < 1e-5
    images = FAMILIES[name].images(4, seed=9)
    again = load_model(tmp_path / "hub", trust_remote_code=True)
    assert torch.allclose(output(again, images), output(small.model, images), atol=1e-5)
    count = sum(parameter.numel() for parameter in small.model.parameters())
    assert sum(parameter.numel() for parameter in again.parameters()) == count


def test_a_backbone_keeps_its_feature_maps_and_its_auto_class(tmp_path: Path) -> None:
    """Case 18: hooks that record hidden states lie on the blocks from the start."""
    transformers: Any = pytest.importorskip("transformers")
    small: Any = saved(tmp_path / "small", "dinov2-backbone", MAPS)
    done = export_hub(small, tmp_path / "hub")
    written = json.loads((done.folder / "config.json").read_text())
    assert {"AutoBackbone", "AutoModel"} < set(written["auto_map"])
    again = transformers.AutoModel.from_pretrained(done.folder, trust_remote_code=True).eval()
    images = FAMILIES["dinov2-backbone"].images(4, seed=9)
    with torch.no_grad():
        found, own = again(images).feature_maps, small.model(images).feature_maps
    assert len(found) == len(own) == 3
    for one, other in zip(found, own, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_every_kind_of_map_is_rebuilt(tmp_path: Path) -> None:
    for kind, options in {
        "scale": {}, "linear": {}, "orthogonal": {}, "identity": {},
        "low-rank": {"rank": 3}, "affine": {"per_token_type": True},
    }.items():  # fmt: skip
        plan = Plan((Replacement(Span(1, 3), kind, **options),))  # type: ignore[arg-type]
        small = saved(tmp_path / kind, "vit-classifier", plan)
        assert export_hub(small, tmp_path / f"{kind}-hub").parity.max_abs_error < 1e-5


def test_reading_back_leaves_no_bytecode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # as it is for most users
    monkeypatch.setattr(sys, "pycache_prefix", None)
    small = saved(tmp_path / "small", "vit-classifier", MAPS)
    export_hub(small, tmp_path / "hub")
    export_hub(small, tmp_path / "hub", overwrite=True)
    small.model.save_pretrained(tmp_path / "own")  # type: ignore[operator]
    for folder in ("hub", "own"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == [
            "README.md", "config.json", "model.safetensors", "modeling_blockfit.py",
        ]  # fmt: skip


def test_the_stock_class_does_not_take_it_for_its_own(tmp_path: Path) -> None:
    import transformers

    export_hub(saved(tmp_path / "small", "vit-classifier", MAPS), tmp_path / "hub")
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForImageClassification.from_pretrained(
            tmp_path / "hub", trust_remote_code=False
        )


def test_a_folder_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = saved(tmp_path / "small", "vit-classifier", MAPS)
    wrong = FAMILIES["vit-classifier"].build(seed=7)
    monkeypatch.setattr("blockfit.formats.hub_folder._read_back", lambda saved, folder: wrong)
    with pytest.raises(BlockfitError, match="Hub folder was not kept"):
        export_hub(small, tmp_path / "hub")
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_other_libraries_are_refused(tmp_path: Path) -> None:
    small = saved(tmp_path / "small", "timm-vit", MAPS)
    with pytest.raises(BlockfitError, match=r"no transformers .*export_onnx or export_prog"):
        export_hub(small, tmp_path / "hub")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hub folder that the command wrote."""
    folder = tmp_path_factory.mktemp("hub")
    shutil.rmtree(folder)
    saved(folder / "small", "vit-classifier", MAPS, prepared(32))
    done = blockfit_command("export", folder / "small", "--hub", "-o", folder / "hub")
    assert done.code == 0, done.err
    assert "trust_remote_code=True" in done.out
    assert f"blockfit push {folder / 'hub'} OWNER/NAME" in done.out
    return folder / "hub"


def test_the_card_says_where_it_comes_from_and_how_it_is_loaded(hub: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(hub / "README.md")
    told = card.data.to_dict()
    assert told["library_name"] == "transformers"
    assert told["pipeline_tag"] == "image-classification"
    assert {"blockfit", "custom_code"} <= set(told["tags"])
    assert "base_model" not in told  # a class, no repository of the Hub
    assert "| 2:3 | 2 | low-rank, rank 4 |" in card.text
    assert "does not state a licence" in card.text
    assert "trust_remote_code=True" in card.text
    assert 'from_pretrained("OWNER/NAME", trust_remote_code=True)' in card.text
    assert str(hub.parent) not in card.text


class Api:
    """Stands for huggingface_hub's: writes to a folder what it is asked to upload."""

    said: list[Any]

    def __init__(self) -> None:
        Api.said = []

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
        if repo == "me/taken" and not exist_ok:
            raise OSError("409: you already created this model repo")
        Api.said.append((repo, private))
        return f"https://huggingface.co/{repo}"

    def create_commit(self, *, operations: list[Any], **told: Any) -> None:
        files = {entry.path_in_repo: entry.path_or_fileobj for entry in operations}
        Api.said.append({**told, "files": files})


def test_push_uploads_the_exported_files_alone(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    told = blockfit_command("push", hub, "me/small", "--private", "--json").json
    assert told["url"] == "https://huggingface.co/me/small"
    assert Api.said[0] == ("me/small", True)
    assert Api.said[1]["repo_id"] == "me/small"
    assert set(Api.said[1]["files"]) == {p.name for p in hub.iterdir()}
    assert Api.said[1]["files"]["README.md"] == (hub / "README.md").read_bytes()
    assert "already created" in blockfit_command("push", hub, "me/taken").error
    assert blockfit_command("push", hub, "me/taken", "--overwrite").code == 0
    assert "has no config.json" in blockfit_command("push", hub.parent, "me/x").error


def test_push_says_on_the_card_where_the_model_comes_from(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import ModelCard

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    before = (hub / "README.md").read_bytes()
    told = ("--base-model", "google/vit-base", "--license", "Apache-2.0")
    assert blockfit_command("push", hub, "me/small", *told).code == 0
    card = ModelCard(Api.said[1]["files"]["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("google/vit-base", "apache-2.0")
    assert "Made from google/vit-base (licence: Apache-2.0) without training" in card.text
    assert card.text.startswith("\n# google/vit-base")
    assert (
        card.text.partition("## How")[2] == ModelCard(before.decode()).text.partition("## How")[2]
    )
    assert (hub / "README.md").read_bytes() == before
    wrong = blockfit_command("push", hub, "me/small", "--base-model", "tiny")
    assert wrong.code == 2
    assert "--base-model" in wrong.error


@pytest.mark.parametrize("folded", [True, False], ids=["stock", "with code"])
def test_a_result_goes_up_in_the_form_that_can_hold_it(
    folded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reader(Api):
        def create_commit(self, *, operations: list[Any], **told: Any) -> None:
            (config,) = (o for o in operations if o.path_in_repo == "config.json")
            (card,) = (o for o in operations if o.path_in_repo == "README.md")
            kind = json.loads(Path(config.path_or_fileobj).read_text("utf-8"))["model_type"]
            data = ModelCard(card.path_or_fileobj.decode()).data
            Api.said.append((kind, data.base_model, data.license))

    from huggingface_hub import ModelCard

    monkeypatch.setattr("huggingface_hub.HfApi", Reader)
    maps = Plan((Replacement(Span(2, 3), "folded"),)) if folded else MAPS
    small = saved(tmp_path / "small", "vit-classifier", maps)
    result = blockfit.Result(small.model, small.plan, {}, small.blocks, small.source)
    origin = {"base_model": "me/vit", "license": "mit"}
    url = result.push_to_hub("me/small", private=True, **origin)
    assert url == "https://huggingface.co/me/small"
    kind = "vit" if folded else "blockfit_vit"
    assert Api.said == [("me/small", True), (kind, "me/vit", "mit")]
    if not folded:  # as transformers' own method of the model
        small.model.push_to_hub("me/small", **origin)  # type: ignore[operator]
        assert Api.said[-1] == (kind, "me/vit", "mit")


def test_what_was_not_exported_is_not_pushed(tmp_path: Path) -> None:
    assert "there is no folder" in blockfit_command("push", tmp_path / "no", "me/small").error
    own = tmp_path / "own"
    own.mkdir()
    (own / "blockfit.json").write_text("{}")
    said = blockfit_command("push", own, "me/small").error
    assert "blockfit's own form" in said
    assert f"(`blockfit export {own}`, or export_hub) and push that" in said
    manifest = mock.Mock(int8={"kind": "weight-only"})
    with mock.patch("blockfit.formats.exported_folder.read_manifest", return_value=manifest):
        assert "push the model before that step" in blockfit_command("push", own, "me/small").error
    (own / "blockfit.json").unlink()
    assert "has no config.json" in blockfit_command("push", own, "me/small").error


def test_push_to_no_repository_and_without_a_network_is_one_sentence(hub: Path) -> None:
    assert "cannot push to not a name" in blockfit_command("push", hub, "not a name").error
    assert "cannot push to me/small" in blockfit_command("push", hub, "me/small").error


def test_the_weights_are_stored_once_and_narrow(tmp_path: Path) -> None:
    small = saved(tmp_path / "small", "vit-classifier", MAPS)
    small.model.half().float()
    export_hub(small, tmp_path / "hub")
    stored = load_file(tmp_path / "hub" / "model.safetensors")
    assert {str(value.dtype) for value in stored.values()} == {"torch.float16"}
