"""Show the stream in a window. Type another prompt below the picture and press Return to switch to it.

    python window.py --prompt "a red ball bouncing in the desert"

Needs tkinter, which comes with Python (on Debian: apt-get install python3-tk).
"""

import argparse
import sys
import threading
import time
import tkinter

import echo_rt


class Window:
    """A picture and a line for prompts. Tk runs on one thread, so nothing here may wait for a block."""

    def __init__(self, root: tkinter.Tk, feed: echo_rt.Feed, fps: int) -> None:
        self.root, self.feed, self.seconds = root, feed, 1 / fps
        self.root.title("echo-rt")
        self.picture, self.line, self.note = (make(self.root) for make in (tkinter.Label, tkinter.Entry, tkinter.Label))
        for part in (self.picture, self.line, self.note):
            part.pack(fill="x")
        self.line.bind("<Return>", self.switch)
        self.error = ""  # what was wrong with the last prompt
        self.frames = iter(())  # of the block that is shown
        self.due = time.monotonic()
        self.root.after(0, self.show)

    def show(self) -> None:
        frame = next(self.frames, None)
        try:
            chunk = self.feed.poll() if frame is None else None
        except Exception as error:  # the stream has failed: show it in the window
            self.picture.configure(text=f"{type(error).__name__}: {error}", image="")
            raise  # Tk prints it, and shows nothing more
        if chunk is not None:
            self.frames = iter(chunk.frames.numpy())
            frame = next(self.frames)
        if frame is not None:
            # Tk reads PPM: a header, then bytes. Tk keeps no reference to the image, so we must.
            self.image = tkinter.PhotoImage(data=b"P6 %d %d 255 " % frame.shape[1::-1] + frame.tobytes())
            self.picture.configure(image=self.image)
        self.note.configure(text=self.error)
        self.due = max(self.due + self.seconds, time.monotonic())  # from the due time, or delays would add up
        self.root.after(round(1000 * (self.due - time.monotonic())), self.show)

    def switch(self, event: object) -> None:
        threading.Thread(target=self.set_prompt, args=[self.line.get()], daemon=True).start()  # it takes a while

    def set_prompt(self, prompt: str) -> None:
        try:
            self.feed.stream.set_prompt(prompt)
            self.error = ""
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--checkpoint")
    parser.add_argument("--recipe", help="needed if the files do not select one; see echo-rt recipes")
    parser.add_argument("--prompt", default="a red ball bouncing in the desert")
    options = parser.parse_args()
    root = tkinter.Tk()
    root.title("echo-rt: loading the model ...")
    root.update()  # show it now: loading takes a while
    with (
        echo_rt.Runtime.from_pretrained(options.model, checkpoint=options.checkpoint, recipe=options.recipe) as runtime,
        echo_rt.share_cpu(runtime.device),  # on a CPU: stay fast beside other programs
        runtime.stream(options.prompt) as stream,
        echo_rt.Feed(stream) as feed,  # makes blocks on a thread, at most two ahead
    ):
        Window(root, feed, runtime.fps).root.mainloop()


if __name__ == "__main__":
    try:
        main()
    except (echo_rt.EchoError, tkinter.TclError) as error:  # one line: what was expected, or that there is no display
        print(f"window.py: error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
