"""examples/serve.py over HTTP: predictions, limits, and clear refusals of bad uploads."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import Done
from commandline import small as small
from PIL import Image

from blockfit.formats import folder as store
from blockfit.models.demo import digits

httpx = pytest.importorskip("httpx")
for needed in ("fastapi", "uvicorn", "multipart", "onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(needed)

SERVE = Path(__file__).resolve().parents[2] / "examples" / "serve.py"


@dataclass
class Server:
    """A process that serves, and a client for it."""

    client: Any
    port: int
    process: subprocess.Popen[bytes]

    def predict(self, *uploads: bytes, **more: Any) -> Any:
        files = [("images", (f"{i}.png", content)) for i, content in enumerate(uploads)]
        return self.client.post("/predict", files=files, **more)

    def refused(self, status: int, *uploads: bytes, **more: Any) -> str:
        answer = self.predict(*uploads, **more)
        assert answer.status_code == status, answer.text
        (key,) = answer.json()
        assert key == "error"
        return answer.json()["error"]


@contextmanager
def serving(model: Path, *options: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SERVE), str(model), "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield Server(client, port, process)
    finally:
        process.terminate()
        process.wait(30)


def until(server: Server, path: str, done: Any) -> Any:
    """Ask until the answer is as wanted."""
    for _ in range(1200):
        assert server.process.poll() is None, "the server has ended"
        try:
            answer = server.client.get(path)
            if done(answer):
                return answer
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    pytest.fail(f"{path} was not as wanted in time")


@pytest.fixture(scope="module")
def onnx_file(small: tuple[Path, Done], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from blockfit.formats.onnx_file import export_onnx

    file = tmp_path_factory.mktemp("serve") / "small.onnx"
    export_onnx(store.load_saved(small[0]), file)
    return file


@pytest.fixture(scope="module")
def server(onnx_file: Path) -> Iterator[Server]:
    limits = ("--images", "3", "--image-bytes", "20000", "--pixels", "1000000", "--read-s", "2")
    with serving(onnx_file, *limits) as one:
        until(one, "/readyz", lambda answer: answer.status_code == 200)
        yield one


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def digit_pictures(count: int) -> list[Image.Image]:
    images, _ = digits("test")
    spread = [(image[0] - image.min()) / (image.max() - image.min()) for image in images[:count]]
    return [Image.fromarray((255 * one).byte().numpy()).convert("RGB") for one in spread]


def test_it_is_alive_and_ready(server: Server) -> None:
    assert server.client.get("/healthz").json() == {"status": "alive"}
    assert server.client.get("/readyz").json() == {"status": "ready", "classes": 10}


def test_predictions_are_those_of_the_model(server: Server, small: tuple[Path, Done]) -> None:
    pictures = digit_pictures(3)
    saved = store.load_saved(small[0])
    assert saved.source.preprocessing is not None
    with torch.no_grad():
        batch = torch.stack([saved.source.preprocessing(picture) for picture in pictures])
        shares = saved.model(batch).softmax(1)
    answer = server.predict(*map(png, pictures), params={"top": 2})
    assert answer.status_code == 200, answer.text
    found = answer.json()["predictions"]
    assert [one["image"] for one in found] == ["0.png", "1.png", "2.png"]
    for one, expected in zip(found, shares, strict=True):
        assert len(one["classes"]) == 2
        assert int(one["classes"][0]["label"]) == int(expected.argmax())
        for entry in one["classes"]:
            wanted = float(expected[int(entry["label"])])
            assert entry["probability"] == pytest.approx(wanted, abs=1e-4)


def test_bad_images_are_refused_by_name(server: Server) -> None:
    good = png(digit_pictures(1)[0])
    assert "1.png is no JPEG, PNG, WEBP image" in server.refused(415, good, b"no image at all")
    assert "0.png is empty" in server.refused(400, b"")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    torn = png(Image.fromarray(noise))[:-2000]
    assert "0.png cannot be decoded" in server.refused(400, torn)
    gif = io.BytesIO()
    digit_pictures(1)[0].save(gif, "GIF")
    assert "is no JPEG" in server.refused(415, gif.getvalue())


def test_what_is_too_large_is_refused(server: Server) -> None:
    good = png(digit_pictures(1)[0])
    assert "4 images are more than the 3" in server.refused(413, good, good, good, good)
    assert "0.png has more than 20000 bytes" in server.refused(413, bytes(20001))
    bomb = png(Image.new("1", (5000, 2000)))
    assert len(bomb) < 20000
    assert "0.png has more than 1000000 pixels" in server.refused(413, bomb)
    assert "larger than 125536 bytes" in server.refused(413, bytes(200_000))


def test_a_body_without_length_is_cut_off(server: Server) -> None:
    def endless() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
        for _ in range(100):
            yield bytes(10_000)

    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = server.client.post("/predict", content=endless(), headers=kind)
    assert answer.status_code == 413
    assert "larger than" in answer.json()["error"]


def test_a_request_without_images_says_what_to_send(server: Server) -> None:
    assert "files named 'images'" in server.client.post("/predict").json()["error"]
    wrong = server.client.post("/predict", files={"pictures": b"x"})
    assert wrong.status_code == 422
    assert server.client.get("/predict").status_code == 405
    assert "top" in server.refused(422, png(digit_pictures(1)[0]), params={"top": 0})


def test_an_upload_that_stalls_is_given_up(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as line:
        line.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        )
        answer = line.recv(4000)
    assert answer.startswith(b"HTTP/1.1 408")
    assert server.client.get("/healthz").status_code == 200


def test_a_slow_model_is_given_up(onnx_file: Path) -> None:
    with serving(onnx_file, "--run-s", "1e-6") as one:
        until(one, "/readyz", lambda answer: answer.status_code == 200)
        assert "no answer within" in one.refused(504, png(digit_pictures(1)[0]))


def test_a_server_without_a_model_lives_but_is_not_ready(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with serving(broken) as one:
        told = until(one, "/readyz", lambda answer: "cannot be loaded" in answer.text)
        assert told.status_code == 503
        assert told.headers["retry-after"] == "1"
        assert one.client.get("/healthz").status_code == 200
        assert "cannot be loaded" in one.refused(503, b"x")
