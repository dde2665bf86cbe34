"""The guard of optional imports."""

from __future__ import annotations

import json
import sys

import pytest

from blockfit.errors import BlockfitError, need


def test_a_module_that_is_there_is_returned() -> None:
    assert need("json", "nothing") is json


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (None, 'absent_library is not installed; pip install "blockfit[plots]"'),
        (
            "a report",
            'a report needs absent_library, which is not installed; pip install "blockfit[plots]"',
        ),
    ],
)
def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    what: str | None, message: str
) -> None:
    with pytest.raises(BlockfitError) as caught:
        need("absent_library.part", "plots", what)
    assert str(caught.value) == message
    assert "absent_library" not in sys.modules
