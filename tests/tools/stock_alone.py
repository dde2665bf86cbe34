"""What people do with a stock checkpoint, run where blockfit is not installed.

``python stock_alone.py FOLDER`` reads ``transformers/`` and ``timm/`` (exported checkpoints),
``in.safetensors`` (images) and ``*.png`` (pictures) there; it writes ``out.safetensors`` with what
every row gave and ``out.json`` with a fact per row, or why the row did not run.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

assert importlib.util.find_spec("blockfit") is None, "blockfit is there"

HERE = Path(sys.argv[1])
INPUT = load_file(HERE / "in.safetensors")
IMAGES, LABELS = INPUT["images"], INPUT["labels"]
PICTURES = [Image.open(path).convert("RGB") for path in sorted(HERE.glob("*.png"))]

Row = Callable[[], tuple[Tensor, Any]]
ROWS: dict[str, Row] = {}


def row(function: Row) -> Row:
    """A row gives outputs, and a fact beside them."""
    ROWS[function.__name__] = function
    return function


def classifier(**options: Any) -> Any:
    auto = transformers.AutoModelForImageClassification
    return auto.from_pretrained(HERE / "transformers", **options).eval()


def timm_model() -> Any:
    return timm.create_model(f"local-dir:{HERE / 'timm'}", pretrained=True).eval()


@torch.no_grad()
def logits(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    out = model(images)
    return out if isinstance(out, Tensor) else out.logits


@row
def pipeline() -> tuple[Tensor, Any]:
    pipe = transformers.pipeline("image-classification", str(HERE / "transformers"), device="cpu")
    names = pipe.model.config.label2id
    scores = torch.zeros(len(PICTURES), len(names))
    for line, found in zip(scores, pipe(PICTURES, top_k=len(names)), strict=True):
        for entry in found:
            line[names[entry["label"]]] = entry["score"]
    return scores, type(pipe.model).__name__


def _in(dtype: torch.dtype) -> tuple[Tensor, Any]:
    model = classifier(dtype=dtype)
    return logits(model, IMAGES.to(dtype)).float(), str(model.dtype)


@row
def float16() -> tuple[Tensor, Any]:
    return _in(torch.float16)


@row
def bfloat16() -> tuple[Tensor, Any]:
    return _in(torch.bfloat16)


def _onnx(model: nn.Module, name: str) -> tuple[Tensor, Any]:
    import onnxruntime

    file = HERE / f"{name}.onnx"
    torch.onnx.export(model, (IMAGES,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (only,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {only.name: IMAGES.numpy()})[0]), only.shape


@row
def onnx_transformers() -> tuple[Tensor, Any]:
    return _onnx(classifier(), "transformers")


@row
def onnx_timm() -> tuple[Tensor, Any]:
    return _onnx(timm_model(), "timm")


@row
def compile_transformers() -> tuple[Tensor, Any]:
    return logits(torch.compile(classifier(), backend="aot_eager")), None


@row
def compile_timm() -> tuple[Tensor, Any]:
    return logits(torch.compile(timm_model(), backend="aot_eager")), None


@row
def validate_timm() -> tuple[Tensor, Any]:
    """As timm's ``validate.py``: the checkpoint says how images are prepared."""
    model = timm_model()
    config = timm.data.resolve_data_config({}, model=model, use_test_size=True)
    transform = timm.data.create_transform(**config, is_training=False)
    loader = torch.utils.data.DataLoader([transform(picture) for picture in PICTURES], batch_size=2)
    return torch.cat([logits(model, batch) for batch in loader]), config["input_size"]


@row
def torchao() -> tuple[Tensor, Any]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = classifier()
    quantize_(model, Int8WeightOnlyConfig())
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    whole = sum(isinstance(module.weight, nn.Parameter) and type(module.weight.data) is Tensor
                for module in linear)  # fmt: skip
    return logits(model), {"linear": len(linear), "left whole": whole}


@row
def peft() -> tuple[Tensor, Any]:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(classifier(), LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    step = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # the second factor of LoRA starts at zero: one step moves it, two both
        step.zero_grad()
        nn.functional.cross_entropy(model(IMAGES).logits, LABELS).backward()
        step.step()
    apart = logits(model.eval())
    model.merge_and_unload().save_pretrained(HERE / "merged")
    auto = transformers.AutoModelForImageClassification
    again = auto.from_pretrained(HERE / "merged").eval()
    count = sum(p.numel() for p in again.parameters())
    return torch.stack([apart, logits(again)]), count


@row
def trainer() -> tuple[Tensor, Any]:
    """One step of plain SGD, so that it can be repeated by hand."""
    examples = [{"pixel_values": i, "labels": int(c)} for i, c in zip(IMAGES, LABELS, strict=True)]
    arguments = transformers.TrainingArguments(
        str(HERE / "trained"), max_steps=1, per_device_train_batch_size=len(examples),
        learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0,
        use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", seed=0,
    )  # fmt: skip
    run = transformers.Trainer(classifier(), arguments, train_dataset=examples)
    steps = run.train().global_step
    run.save_model()
    auto = transformers.AutoModelForImageClassification
    return logits(auto.from_pretrained(HERE / "trained").eval()), steps


NEEDS = {"torchao": "torchao", "peft": "peft", "onnx_transformers": "onnxscript",
         "onnx_timm": "onnxscript", "trainer": "accelerate"}  # fmt: skip
"""Rows by the package that they need beside torch, timm and transformers."""


def main() -> None:
    outputs, told = {}, {}
    for name, function in ROWS.items():
        needed = NEEDS.get(name)
        if needed and importlib.util.find_spec(needed) is None:
            told[name] = {"skipped": f"{needed} is not installed"}
            continue
        try:
            found, fact = function()
            outputs[name] = copy.copy(found.detach().float().contiguous())
            told[name] = {"fact": fact}
        except Exception:  # the test of this row shows it
            told[name] = {"failed": traceback.format_exc()}
    assert not [name for name in sys.modules if name.partition(".")[0] == "blockfit"]
    save_file(outputs, HERE / "out.safetensors")
    (HERE / "out.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
