"""A Hub that does not answer is found out once, quickly and in silence."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from blockfit.data import tables
from blockfit.models import hub

constants = pytest.importorskip("huggingface_hub.constants")
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


class Answers(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    own = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=own.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{own.server_port}"
    own.shutdown()
    own.server_close()


def test_whatever_answers_is_a_hub(
    server: str, online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", server)
    assert not hub.silent()
    assert hub.only_cached({}) == {}


def test_a_hub_that_does_not_answer_is_not_asked_again(
    online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    assert hub.silent()
    assert hub.only_cached({"revision": "x"}) == {"local_files_only": True}
    assert hub.only_cached({"local_files_only": False}) == {}
    config = SimpleNamespace(hf_hub_id="nobody/nothing", hf_hub_filename=None)
    with pytest.raises(OSError, match="does not answer"):
        hub.need(config, {})
    hub.need(config, {"checkpoint_path": "x"})
    hub.need(SimpleNamespace(hf_hub_id=None), {})


def test_the_libraries_keep_their_offline_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    assert not hub.silent()


def test_cached_weights_need_no_hub(
    online: None, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    folder = f"{tmp_path}/models--nobody--nothing"
    os.makedirs(f"{folder}/refs")
    os.makedirs(f"{folder}/snapshots/abc")
    for path, text in (("refs/main", "abc"), ("snapshots/abc/model.safetensors", "x")):
        with open(f"{folder}/{path}", "w", encoding="utf-8") as file:
            file.write(text)
    config = SimpleNamespace(hf_hub_id="nobody/nothing", hf_hub_filename=None)
    hub.need(config, {"cache_dir": str(tmp_path)})
    with pytest.raises(OSError, match="does not answer"):
        hub.need(SimpleNamespace(hf_hub_id="nobody/nothing", hf_hub_filename="other.bin"), {})


LOAD = """
import sys, torch, timm, transformers
from blockfit.data.images import images
from blockfit.errors import BlockfitError
from blockfit.models.load import load_model
def load(name):
    return load_model(name, cache_dir=sys.argv[1])
for get, name in (
    (load, "nobody/nothing"), (load, "timm/vit_tiny_patch16_224"), (images, "nobody/nothing")
):
    try:
        get(name)
    except BlockfitError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What is said of two models and of a data set that cannot be had.

    In a process of its own: the libraries read their environment when they are imported.
    """
    for name in ("timm", "transformers", "datasets"):
        pytest.importorskip(name)
    online = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "no_proxy": "*"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path_factory.mktemp("cache"))],
        env={**os.environ, **online, "HF_ENDPOINT": NOBODY},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr
    assert done.stdout.count("\n") == 3
    return done.stdout.splitlines()


def test_loading_by_name_fails_in_one_sentence_and_without_retries(answers: list[str]) -> None:
    assert "hf download nobody/nothing --local-dir FOLDER" in answers[0]
    assert "hf download timm/vit_tiny_patch16_224" in answers[1]


def test_a_data_set_by_name_is_looked_for_in_the_cache_alone(
    online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    asked: list[bool] = []

    def cached(name: str) -> str:
        asked.append(datasets.config.HF_HUB_OFFLINE)
        return f"{name} from the cache"

    monkeypatch.setattr(datasets, "load_dataset", cached)
    assert tables.load_dataset("nobody/nothing") == "nobody/nothing from the cache"
    assert asked == [True]
    assert datasets.config.HF_HUB_OFFLINE is False


def test_a_data_set_that_cannot_be_had_is_one_sentence_without_retries(answers: list[str]) -> None:
    assert "the Hub does not answer" in answers[2]
    assert "hf download nobody/nothing --repo-type dataset" in answers[2]
