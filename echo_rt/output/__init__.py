"""Files that a stream is written to: each appears whole under its name, or not at all.

:class:`Recorder` writes a stream to one file, :class:`SegmentRecorder` to segments that survive a kill,
:class:`Checkpoints` its snapshots to resume from. :class:`VideoFile` reads what a stream begins with.
"""

from echo_rt.output.contact_sheet import ContactSheet as ContactSheet
from echo_rt.output.latents import LatentsWriter as LatentsWriter
from echo_rt.output.reader import VideoFile as VideoFile
from echo_rt.output.recorder import Checkpoints as Checkpoints
from echo_rt.output.recorder import Recorder as Recorder
from echo_rt.output.recorder import SegmentRecorder as SegmentRecorder
from echo_rt.output.segments import SegmentedWriter as SegmentedWriter
from echo_rt.output.video import VideoWriter as VideoWriter
