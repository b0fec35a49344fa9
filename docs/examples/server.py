"""Serves the stream as motion JPEG to any number of browsers, which all see the same video.

    pip install fastapi uvicorn pillow
    python server.py MODEL CHECKPOINT
    curl http://127.0.0.1:8000/prompt --data "the fox dives into a lake"

A slow viewer misses frames, and holds up neither the others nor the stream.
"""

import asyncio
import contextlib
import io
import sys
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, StreamingResponse
from PIL import Image

import echo_rt


def make_app(stream: echo_rt.Stream, fps: int) -> FastAPI:
    fresh, newest = asyncio.Condition(), b""

    async def broadcast(feed: echo_rt.Feed) -> None:
        nonlocal newest
        loop = asyncio.get_running_loop()
        due = loop.time()
        async for chunk in feed:
            for frame in chunk.frames.numpy():
                jpeg = io.BytesIO()
                Image.fromarray(frame).save(jpeg, "JPEG")
                await asyncio.sleep(due - loop.time())
                due = max(due, loop.time()) + 1 / fps
                async with fresh:
                    newest = jpeg.getvalue()
                    fresh.notify_all()

    async def view() -> AsyncIterator[bytes]:
        while True:
            async with fresh:
                await fresh.wait()
                jpeg = newest
            yield b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n" % (len(jpeg), jpeg)

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async with echo_rt.Feed(stream) as feed:
            task = asyncio.create_task(broadcast(feed))
            yield
            task.cancel()

    app = FastAPI(lifespan=life)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse("<!doctype html><title>echo-rt</title><img src=video>")

    @app.get("/video")
    async def video() -> StreamingResponse:
        return StreamingResponse(view(), media_type="multipart/x-mixed-replace; boundary=frame")

    @app.post("/prompt")
    async def prompt(request: Request) -> dict[str, int]:
        try:  # on another thread: encoding takes a while, and the event loop has viewers to serve
            await asyncio.to_thread(stream.set_prompt, (await request.body()).decode())
        except echo_rt.PromptError as error:
            raise HTTPException(422, str(error)) from error
        return {"from_block": stream.next_prompt_block}

    return app


if __name__ == "__main__":
    load = echo_rt.Runtime.from_pretrained
    with load(sys.argv[1], checkpoint=sys.argv[2]) as runtime, runtime.stream("a red fox in the snow") as stream:
        # Viewers never leave by themselves: without a bound, Ctrl-C would wait for them.
        uvicorn.run(make_app(stream, runtime.fps), timeout_graceful_shutdown=1)
