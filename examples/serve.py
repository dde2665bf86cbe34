"""A compressed image classifier in ONNX, served over HTTP.

    blockfit export small/ --onnx -o small.onnx
    pip install 'blockfit[serve]'
    python examples/serve.py small.onnx --port 8000
    curl -F images=@cat.jpg -F images=@dog.jpg 'http://127.0.0.1:8000/predict?top=3'

``/healthz`` says that the process lives, ``/readyz`` that the model is loaded. Uploads are limited
in number, bytes, pixels and time; every refusal is JSON with a sentence that says what to change.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blockfit.data.decode import Unreadable, decode
from blockfit.models.preprocessing import Preprocessing

log = logging.getLogger("serve")

FORMATS = ("JPEG", "PNG", "WEBP")
"""What uploads may be; fewer decoders are fewer ways in."""

ENVELOPE = 64 * 1024
"""Bytes that a multipart request may have beside its images."""


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Args:
        images: in one request, which is one batch of the model.
        image_bytes: of each upload.
        pixels: of each image, looked up before it is decoded.
        waiting: requests that may wait for the model; more are sent away.
        read_s: seconds without a byte of the upload.
        run_s: seconds until the answer, waiting included.
    """

    images: int = 16
    image_bytes: int = 10 * 1024 * 1024
    pixels: int = 25_000_000
    waiting: int = 32
    read_s: float = 10.0
    run_s: float = 30.0

    @property
    def body_bytes(self) -> int:
        return self.images * self.image_bytes + ENVELOPE


class Classifier:
    """An ONNX file that blockfit wrote: it says itself how images are prepared.

    Args:
        path: of the file.
        threads: of onnxruntime.

    Raises:
        ValueError: where the file is no classifier, or was not written by blockfit.
    """

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        told = self.session.get_modelmeta().custom_metadata_map
        if "blockfit.preprocessing" not in told:
            raise ValueError(
                f"{path} does not say how images are prepared; export it with blockfit"
            )
        self.preprocessing = Preprocessing.from_json(json.loads(told["blockfit.preprocessing"]))
        names = [output.name for output in self.session.get_outputs()]
        self.output = "logits" if "logits" in names else names[0]
        (self.input,) = (value.name for value in self.session.get_inputs())
        labels = json.loads(told.get("blockfit.labels", "null"))
        blank = self.logits([Image.new("RGB", (64, 64))])  # the first run is the slowest
        if blank.ndim != 2:
            raise ValueError(f"the output of {path} has shape {blank.shape}, which are no classes")
        self.labels = labels or [str(number) for number in range(blank.shape[1])]

    def logits(self, pictures: list[Image.Image]) -> np.ndarray:
        """Logits of RGB pictures, shape (pictures, classes)."""
        batch = np.stack([self.preprocessing(picture).numpy() for picture in pictures])
        (values,) = self.session.run([self.output], {self.input: batch})
        return np.asarray(values, dtype=np.float64)

    def classify(self, pictures: list[Image.Image], top: int) -> list[list[dict[str, Any]]]:
        """The most probable classes of each picture, most probable first."""
        logits = self.logits(pictures)
        odds = np.exp(logits - logits.max(1, keepdims=True))
        shares = odds / odds.sum(1, keepdims=True)
        return [
            [{"label": self.labels[i], "probability": float(row[i])} for i in order[:top]]
            for row, order in zip(shares, np.argsort(-shares, axis=1), strict=True)
        ]


def picture_of(content: bytes, name: str, limits: Limits) -> Image.Image:
    """An upload as an RGB picture.

    Raises:
        HTTPException: 400, 413 or 415 where it is none, or too large.
    """
    if not content:
        raise HTTPException(400, f"{name} is empty; send an image file")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            pixels = image.width * image.height
    except Image.DecompressionBombError:
        pixels = limits.pixels + 1
    except Exception as error:  # Pillow's plugins raise nearly anything on broken headers
        raise HTTPException(415, f"{name} is no {', '.join(FORMATS)} image") from error
    if pixels > limits.pixels:
        raise HTTPException(413, f"{name} has more than {limits.pixels} pixels; send a smaller one")
    try:
        return decode(content)
    except Unreadable as error:
        raise HTTPException(400, f"{name} cannot be decoded: {error}") from error


class BodyLimit:
    """Middleware that stops reading a request that is too large or too slow."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen, whole = 0, False

        async def limited() -> Message:
            nonlocal seen, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.limits.read_s)
            except asyncio.TimeoutError:
                seconds = self.limits.read_s
                raise HTTPException(408, f"no byte came for {seconds:g} s; send faster") from None
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > self.limits.body_bytes:
                raise _too_large(self.limits)
            return message

        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limits.body_bytes:
            await _refusal(413, _too_large(self.limits).detail)(scope, receive, send)
            return
        await self.app(scope, limited, send)


def _too_large(limits: Limits) -> HTTPException:
    return HTTPException(
        413,
        f"the request is larger than {limits.body_bytes} bytes; send at most {limits.images} "
        f"images of {limits.image_bytes} bytes each",
    )


def _refusal(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, status, headers=headers)


class Service:
    """The model, the one thread that runs it, and how many requests wait for that."""

    def __init__(self, path: Path, limits: Limits, threads: int) -> None:
        self.path, self.limits, self.threads = path, limits, threads
        self.classifier: Classifier | None = None
        self.problem = "the model is being loaded"
        self.waiting = 0
        self.pool = ThreadPoolExecutor(max_workers=1)

    def load(self) -> None:
        """Load the model; what goes wrong is told by ``/readyz``."""
        try:
            self.classifier = Classifier(self.path, self.threads)
        except Exception as error:  # onnxruntime's errors have no common class
            self.problem = f"the model cannot be loaded: {str(error).splitlines()[0]}"
            log.exception("cannot load %s", self.path)

    def ready(self) -> Classifier:
        """The model.

        Raises:
            HTTPException: 503 where it is not loaded.
        """
        if self.classifier is None:
            raise HTTPException(503, self.problem, headers={"Retry-After": "1"})
        return self.classifier

    async def run(self, work: Callable[[], Any]) -> Any:
        """``work()`` in the model's thread.

        Raises:
            HTTPException: 503 where too many wait already, 504 where it takes too long.
        """
        if self.waiting >= self.limits.waiting:
            raise HTTPException(503, "too many requests are waiting", headers={"Retry-After": "1"})
        self.waiting += 1
        try:
            future = asyncio.get_running_loop().run_in_executor(self.pool, work)
            return await asyncio.wait_for(future, self.limits.run_s)
        except asyncio.TimeoutError:
            raise HTTPException(504, f"no answer within {self.limits.run_s:g} s") from None
        finally:
            self.waiting -= 1


def create_app(path: Path, limits: Limits | None = None, threads: int = 1) -> FastAPI:
    """The application; the model is loaded in the background when it starts."""
    limits = limits or Limits()
    service = Service(path, limits, threads)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.get_running_loop().run_in_executor(service.pool, service.load)
        yield
        await loading
        service.pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="blockfit", lifespan=lifespan)
    app.add_middleware(BodyLimit, limits=limits)

    @app.exception_handler(AnyHTTPException)
    async def refused(request: Request, error: AnyHTTPException) -> JSONResponse:
        return _refusal(error.status_code, error.detail, dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        hint = "send images as multipart form files named 'images'"
        return _refusal(422, f"{where}: {first['msg']}; {hint}")

    @app.get("/healthz")
    async def alive() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    async def ready() -> dict[str, Any]:
        classifier = service.ready()
        return {"status": "ready", "classes": len(classifier.labels)}

    @app.post("/predict")
    async def predict(
        images: list[UploadFile], top: Annotated[int, Query(ge=1, le=100)] = 5
    ) -> dict[str, Any]:
        classifier = service.ready()
        if len(images) > limits.images:
            raise HTTPException(
                413, f"{len(images)} images are more than the {limits.images} of one request"
            )
        names, contents = [], []
        for number, image in enumerate(images):
            names.append(image.filename or f"image {number}")
            contents.append(await image.read(limits.image_bytes + 1))
            if len(contents[-1]) > limits.image_bytes:
                raise HTTPException(413, f"{names[-1]} has more than {limits.image_bytes} bytes")

        def work() -> list[list[dict[str, Any]]]:
            pictures = [
                picture_of(content, name, limits)
                for content, name in zip(contents, names, strict=True)
            ]
            return classifier.classify(pictures, top)

        found = await service.run(work)
        return {
            "predictions": [
                {"image": name, "classes": classes}
                for name, classes in zip(names, found, strict=True)
            ]
        }

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="an ONNX file that blockfit export wrote")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime")
    for name, value in vars(Limits()).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(value), default=value, help=f"default {value}")
    args = vars(parser.parse_args())
    limits = Limits(**{name: args[name] for name in vars(Limits())})
    app = create_app(args["model"], limits, args["threads"])
    uvicorn.run(app, host=args["host"], port=args["port"], timeout_keep_alive=5)


if __name__ == "__main__":
    main()
