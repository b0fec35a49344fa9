"""Serve the stream as motion JPEG to any number of browsers, which all see the same video.

    pip install fastapi uvicorn pillow
    python server.py MODEL CHECKPOINT
    curl http://127.0.0.1:8000/prompt --data "the fox dives into a lake"

A slow viewer misses frames, but does not delay the others or the stream.
"""

import asyncio
import contextlib
import io
import signal
import sys
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, StreamingResponse
from PIL import Image

import echo_rt
from echo_rt import share_cpu


def make_app(stream: echo_rt.Stream, fps: int) -> FastAPI:
    fresh, newest = asyncio.Condition(), b""

    async def broadcast(feed: echo_rt.Feed) -> None:
        nonlocal newest
        due = (loop := asyncio.get_running_loop()).time()
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
            yield b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n" % (len(newest), newest)

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async with echo_rt.Feed(stream) as feed:  # a failure ends the server, or viewers would wait for ever
            task = asyncio.create_task(broadcast(feed))
            task.add_done_callback(lambda done: done.cancelled() or signal.raise_signal(signal.SIGTERM))
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
    model, checkpoint = sys.argv[1:] if len(sys.argv) == 3 else sys.exit(__doc__)
    try:
        runtime = echo_rt.Runtime.from_pretrained(model, checkpoint=checkpoint)
        with runtime, share_cpu(runtime.device), runtime.stream("a red fox in the snow") as stream:
            uvicorn.run(make_app(stream, runtime.fps), timeout_graceful_shutdown=1)  # viewers never leave on their own
    except echo_rt.EchoError as error:  # one line: what was expected and what was found
        print(f"server.py: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
