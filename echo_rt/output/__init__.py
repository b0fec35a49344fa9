"""Files that a stream is written to: each appears whole under its name, or not at all.

A stream in one file::

    with (
        Recorder("fox.mp4", frame_size=runtime.frame_size, fps=runtime.fps, frame_limit=160) as recorder,
        runtime.stream("a red fox in the snow") as stream,
    ):
        while not recorder.full:
            recorder.write(next(stream))

:class:`SegmentRecorder` writes segments that survive a kill, :class:`Checkpoints` snapshots to resume from.
:class:`VideoFile` reads a video or a picture to begin a stream with.
"""

from echo_rt.output.contact_sheet import ContactSheet
from echo_rt.output.latents import LatentsWriter
from echo_rt.output.reader import VideoFile
from echo_rt.output.recorder import Checkpoints, Recorder, SegmentRecorder
from echo_rt.output.segments import SegmentedWriter
from echo_rt.output.video import VideoWriter

__all__ = [
    "Checkpoints",
    "ContactSheet",
    "LatentsWriter",
    "Recorder",
    "SegmentRecorder",
    "SegmentedWriter",
    "VideoFile",
    "VideoWriter",
]
