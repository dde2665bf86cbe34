"""Preprocessing equals the library's own to the last bit, and comes back from JSON as it was."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import blockfit
from blockfit.errors import BlockfitError
from blockfit.models.load import load_model
from blockfit.models.preprocessing import (
    Preprocessing,
    preprocessing_of,
    read_preprocessing,
    timm_preprocessing,
    torchvision_preprocessing,
    transformers_preprocessing,
)


def photos() -> list[Image.Image]:
    """Two real photographs of scikit-learn (427 × 640), whole, upright and tiny, and a grey one."""
    datasets = pytest.importorskip("sklearn.datasets")
    china, flower = (Image.fromarray(array) for array in datasets.load_sample_images().images)
    upright = china.transpose(Image.Transpose.ROTATE_90)
    return [china, flower, upright, flower.resize((31, 17)), china.crop((5, 9, 302, 306))]


def again(preprocessing: Preprocessing) -> Preprocessing:
    return Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json())))


def save_processor(folder: Path, **settings: object) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"image_processor_type": "ViTImageProcessor", "size": 32},
        {"image_processor_type": "ViTFeatureExtractor", "size": {"height": 24, "width": 40}},
        {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": 36},
            "crop_size": 32,
        },
        {
            "image_processor_type": "CLIPImageProcessorPil",
            "size": {"shortest_edge": 36},
            "crop_size": {"height": 32, "width": 32},
        },
        {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": 32, "width": 32},
            "resample": 2,
        },
        {"image_processor_type": "DeiTImageProcessor", "size": {"height": 36, "width": 36}},
        {
            "image_processor_type": "BeitImageProcessor",
            "size": {"height": 32, "width": 32},
            "do_normalize": False,
        },
    ],
    ids=lambda settings: str(settings["image_processor_type"]),
)
def test_transformers_kind_equals_the_image_processor(
    settings: dict[str, object], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    if str(settings["image_processor_type"]).endswith("FeatureExtractor"):
        settings = {**settings, "feature_extractor_type": settings["image_processor_type"]}
        del settings["image_processor_type"]
    save_processor(tmp_path, **settings)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    found = transformers_preprocessing(str(tmp_path))
    assert found is not None
    rebuilt = again(found)
    assert rebuilt == found
    for photo in photos():
        expected = processor(photo, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(rebuilt(photo), expected)
        assert expected.dtype == torch.float32


@pytest.mark.shared
def test_the_real_checkpoint_is_prepared_as_transformers_does(shared_model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(shared_model)
    rebuilt = again(preprocessing_of(load_model(shared_model)))
    for photo in photos():
        expected = processor(photo, return_tensors="pt")["pixel_values"][0]
        assert expected.shape == (3, 98, 98)
        assert torch.equal(rebuilt(photo), expected)
    assert rebuilt.describe() == (
        "resize to 98 × 98, bicubic, mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225) "
        "(BitImageProcessor)"
    )


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_base_patch16_siglip_224"]
)
def test_timm_kind_equals_create_transform(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, depth=1)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    rebuilt = again(timm_preprocessing(model))
    for photo in photos():
        assert torch.equal(rebuilt(photo), transform(photo))


def test_timm_kind_follows_the_size_and_the_channels_that_the_model_was_built_for() -> None:
    timm = pytest.importorskip("timm")
    small = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=(32, 48))
    assert preprocessing_of(small)(photos()[0]).shape == (3, 32, 48)
    grey = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, in_chans=1)
    assert preprocessing_of(grey)(photos()[0]).shape == (1, 32, 32)


@pytest.mark.parametrize("weights", ["IMAGENET1K_V1", "IMAGENET1K_SWAG_E2E_V1"])
def test_torchvision_kind_equals_the_weights_transforms(weights: str) -> None:
    models = pytest.importorskip("torchvision.models")
    entry = models.ViT_B_16_Weights[weights]
    rebuilt = again(torchvision_preprocessing(entry))
    for photo in photos()[:3]:
        assert torch.equal(rebuilt(photo), entry.transforms()(photo))


def test_plain_kind_is_pillows_resize_scaled_and_normalised() -> None:
    prepare = again(Preprocessing.plain((24, 40), mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7]))
    photo = photos()[0]
    resized = photo.resize((40, 24), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized, dtype=np.float64).transpose(2, 0, 1) / 255
    mean, std = (np.reshape(v, (3, 1, 1)) for v in ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))
    out = prepare(photo)
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), (pixels - mean) / std, rtol=1e-5, atol=1e-6)


def test_plain_kind_cuts_out_the_centre_where_asked_to() -> None:
    wide = Image.new("RGB", (60, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (20, 0, 40, 20))
    blue = Preprocessing.plain(10, mean=[0] * 3, std=[1] * 3, interpolation="nearest", crop=True)
    assert torch.equal(blue(wide), torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1).expand(3, 10, 10))


def test_plain_kind_makes_one_channel_of_a_colour_photo() -> None:
    prepare = Preprocessing.plain(8, channels=1, mean=[0.5], std=[0.5], interpolation="box")
    out = prepare(photos()[0])
    assert out.shape == (1, 8, 8)
    assert float(out.min()) >= -1
    assert float(out.max()) <= 1


def test_preprocessing_reaches_worker_processes() -> None:
    prepare = Preprocessing.plain(8)
    photo = photos()[3]
    expected = prepare(photo)  # builds what pickling must leave behind
    assert torch.equal(pickle.loads(pickle.dumps(prepare))(photo), expected)  # noqa: S301


def test_settings_that_are_unknown_missing_or_wrong_are_refused_by_name() -> None:
    good = Preprocessing.plain(8).to_json()
    with pytest.raises(BlockfitError, match=r"file: plain preprocessing: unknown key 'sizes'"):
        Preprocessing.from_json({**good, "settings": {**good["settings"], "sizes": 3}}, "file")
    short = {key: value for key, value in good["settings"].items() if key != "std"}
    with pytest.raises(BlockfitError, match="key 'std' is missing"):
        Preprocessing.from_json({"kind": "plain", "settings": short})
    with pytest.raises(BlockfitError, match="expected an object with kind and settings"):
        Preprocessing.from_json({**good, "more": 1})
    with pytest.raises(BlockfitError, match="unknown kind of preprocessing 'open_clip'"):
        Preprocessing.from_json({"kind": "open_clip", "settings": {}})
    with pytest.raises(BlockfitError, match=r"mean needs one number per channel \(1\)"):
        Preprocessing.plain(8, channels=1, mean=[0.1, 0.2, 0.3])
    with pytest.raises(BlockfitError, match="unknown interpolation 'cubic'"):
        Preprocessing.plain(8, interpolation="cubic")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("size", value) for value in (8, None, "ab", [8], [8, True], [8, 0], {"a": 1, "b": 2})),
        *(("channels", value) for value in (2, True, 3.0, [3], None)),
        *(("mean", value) for value in (0, None, "abc", [1, 2, "3"], [1, 2, None], [[1], 2, 3])),
        *(("std", value) for value in (1, [1, 1], [1, 1, True])),
        *(("interpolation", value) for value in (3, ["box"], {}, None)),
        *(("crop", value) for value in (1, "yes", None)),
    ],
)
def test_settings_of_another_type_are_refused(key: str, value: object) -> None:
    """A random folder of the fuzz had a number for ``mean`` and got a traceback."""
    good = Preprocessing.plain(8).settings
    with pytest.raises(BlockfitError, match=f"plain preprocessing: .*{key}"):
        Preprocessing.from_json({"kind": "plain", "settings": {**good, key: value}})


@pytest.mark.parametrize("name", ["AutoModel", "pipeline", "NoSuchProcessor", "os"])
def test_a_processor_that_is_none_of_transformers_is_refused(name: str) -> None:
    pytest.importorskip("transformers")
    prepare = Preprocessing("transformers", {"image_processor_type": name})
    with pytest.raises(BlockfitError, match="no image processor"):
        prepare(photos()[3])


def test_a_model_that_does_not_say_how_its_images_are_prepared_is_named() -> None:
    with pytest.raises(BlockfitError, match=r"Linear does not say .* preprocessing=224"):
        preprocessing_of(nn.Linear(2, 2))


def test_a_preprocessing_in_few_words(tmp_path: Path) -> None:
    assert read_preprocessing(224) == read_preprocessing("224") == Preprocessing.plain(224)
    assert read_preprocessing("32x48") == read_preprocessing("32 × 48")
    assert read_preprocessing("32x48") == Preprocessing.plain((32, 48))
    file = tmp_path / "own.json"
    file.write_text(json.dumps(Preprocessing.plain(16, crop=True).to_json()))
    assert read_preprocessing(str(file)) == Preprocessing.plain(16, crop=True)


def test_the_preprocessing_of_transformers_and_timm_by_name(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.ViTImageProcessor(size={"height": 20, "width": 20})
    processor.save_pretrained(tmp_path)
    by_folder = read_preprocessing(str(tmp_path))
    by_file = read_preprocessing(str(tmp_path / "preprocessor_config.json"))
    picture = Image.effect_noise((30, 24), 80).convert("RGB")
    assert torch.equal(by_folder(picture), by_file(picture))
    assert by_folder(picture).shape == (3, 20, 20)
    pytest.importorskip("timm")
    found = read_preprocessing("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    assert found.settings["mean"] == [0.5, 0.5, 0.5]
    assert found.settings["input_size"] == [3, 224, 224]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "no size such as 224 or 224x160, no file, and no model"),
        ("{", "cannot be read as JSON"),
        ('{"hidden_size": 3}', "says no preprocessing; give a preprocessor_config.json"),
        ("[1]", "says no preprocessing"),
    ],
)
def test_what_says_no_preprocessing_is_refused(
    content: str | None, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / "some.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BlockfitError, match=match):
        read_preprocessing(str(file) if content is not None else "timm/nothing_of_this_name")


@pytest.mark.parametrize("way", ["compress", "calibrate", "sweep"])
def test_what_prepared_the_images_is_saved_with_the_small_model(way: str, tmp_path: Path) -> None:
    """Else it would be judged on images that are prepared otherwise, or on none."""
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    shape = {"num_hidden_layers": 3, "image_size": 16, "patch_size": 8, "num_labels": 3}
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**size, **shape))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(12):
        Image.effect_noise((20, 18), 20 * i + 1).convert("RGB").save(pictures / f"{i}.png")
    how = {"preprocessing": 16}
    if way == "compress":
        small = blockfit.compress(model.eval(), pictures, params="80%", **how)
    elif way == "calibrate":
        small = blockfit.calibrate(model.eval(), pictures, **how).compress(params="80%")
    else:
        blockfit.sweep(model.eval(), pictures, tmp_path / "sweep", points=[0.8], **how)
        small = blockfit.from_sweep(tmp_path / "sweep", model=model, params="80%")
    blockfit.save(small, tmp_path / "small")
    loaded = blockfit.load(tmp_path / "small")
    assert preprocessing_of(loaded) == Preprocessing.plain(16)
    assert blockfit.evaluate(loaded, pictures).images == 12
