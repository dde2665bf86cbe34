"""What libraries put around a model is taken off; what a user puts around it stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import small_images, small_vit
from torch import Tensor, nn

import blockfit
from blockfit.models.wrappers import bare


class Scaled(nn.Module):
    """A user's own class around a model under a name that libraries use, too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x / 2)
        return out


WRAPPED = {
    "compiled": lambda model: torch.compile(model),
    "parallel": nn.DataParallel,
    "average": torch.optim.swa_utils.AveragedModel,
    "twice": lambda model: torch.compile(nn.DataParallel(model)),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_model_gives_what_the_model_gives(kind: str) -> None:
    model = small_vit(3)
    wrapped = WRAPPED[kind](model)
    result = blockfit.compress(wrapped, small_images(24), spans=["1:2"], final=0)
    expected = blockfit.compress(model, small_images(24), spans=["1:2"], final=0)
    assert type(result.model) is type(model)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_with_what_to_give() -> None:
    pictures = torch.rand(24, 3, 12, 12)
    traced = torch.jit.trace(small_vit(3), pictures[:1])
    for verb in (blockfit.compress, blockfit.analyze, blockfit.evaluate):
        how = {"remove": 1} if verb is blockfit.compress else {}
        with pytest.raises(blockfit.BlockfitError, match="the model is TorchScript, whose"):
            verb(traced, pictures, **how)


def test_a_users_own_class_around_a_model_is_the_model(tmp_path: Path) -> None:
    own = Scaled(small_vit(3)).eval()
    assert bare(own) is own
    result = blockfit.compress(own, small_images(24), spans=["1:2"], final=0)
    blockfit.save(result.model, tmp_path / "small")
    back = blockfit.load(tmp_path / "small", model=Scaled(small_vit(3)).eval())
    x = next(iter(small_images(4)))
    assert torch.equal(back(x), result.model(x))
