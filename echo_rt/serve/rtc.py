"""WebRTC: the encoded pictures of a session as RTP, without another encoder."""

from __future__ import annotations

import asyncio
import json
from fractions import Fraction
from typing import Any

import aiortc
import av

from echo_rt.errors import ConfigError, EchoError
from echo_rt.serve.session import CLOCK
from echo_rt.serve.viewers import Channel, Viewer, logger
from echo_rt.utils.wording import with_type

_CONNECT_SECONDS = 10.0
_CLOSE_SECONDS = 1.0  # a peer that has left without a word is not waited for


class Peers:
    """The peer connections of a channel. ``servers``: STUN and TURN servers, as ``RTCIceServer`` has them."""

    def __init__(self, channel: Channel, servers: list[dict[str, str]]) -> None:
        # Given even if there are none: without a configuration, aiortc asks a STUN server outside.
        self._configuration = aiortc.RTCConfiguration([aiortc.RTCIceServer(**server) for server in servers])
        self._channel = channel
        self._tasks: set[asyncio.Future[Any]] = set()

    async def answer(self, sdp: str) -> dict[str, str]:
        """Answer an offer and send pictures until the peer leaves; :class:`ConfigError` for a bad offer."""
        answered: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._serve(sdp, answered))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await answered

    async def close(self) -> None:
        """End all connections."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_SECONDS)

    async def _serve(self, sdp: str, answered: asyncio.Future[dict[str, str]]) -> None:
        peer = aiortc.RTCPeerConnection(self._configuration)
        over, connected = asyncio.Event(), asyncio.Event()

        def changed() -> None:
            {"connected": connected, "failed": over, "closed": over}.get(peer.connectionState, asyncio.Event()).set()

        peer.on("connectionstatechange", changed)
        try:
            with self._channel.view("h264") as viewer:
                track = _Track(viewer)
                peer.on("datachannel", lambda channel: track.clocks.append(channel))
                track.sender = sender = peer.addTrack(track)
                # A peer that lost pictures asks for a key frame, of which this sender's own encoder knows nothing.
                sender._send_keyframe = self._want_key  # type: ignore[method-assign]
                codecs = aiortc.RTCRtpSender.getCapabilities("video").codecs
                peer.getTransceivers()[0].setCodecPreferences([one for one in codecs if one.name in ("H264", "rtx")])
                await peer.setRemoteDescription(aiortc.RTCSessionDescription(sdp, "offer"))
                await peer.setLocalDescription(await peer.createAnswer())
                answered.set_result({"type": "answer", "sdp": peer.localDescription.sdp})
                await asyncio.wait_for(connected.wait(), _CONNECT_SECONDS)
                self._want_key()
                await over.wait()
        except asyncio.TimeoutError:
            logger.info("a peer did not connect within %g seconds", _CONNECT_SECONDS)
        except Exception as error:  # aiortc's of any kind, for what a client wrote
            if answered.done():
                raise
            wrong = ConfigError(f"sdp: expected an offer of H.264: {with_type(error)}")
            answered.set_exception(error if isinstance(error, EchoError) else wrong)
        finally:
            await peer.close()

    def _want_key(self) -> None:
        task = asyncio.ensure_future(self._channel.session.ask("keyframe"))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Track(aiortc.MediaStreamTrack):
    """Pictures of a viewer's queue, as packets that aiortc sends as they are."""

    kind = "video"

    def __init__(self, viewer: Viewer) -> None:
        super().__init__()
        self._viewer, self._pts = viewer, -1
        self.sender: Any = None
        self.clocks: list[Any] = []

    async def recv(self) -> Any:
        """Return the next picture; the one before it has been sent."""
        while self.clocks and self._pts >= 0 and self.clocks[0].readyState == "open":
            # aiortc begins at a random time stamp and keeps it to itself.
            stamp = getattr(self.sender, "_RTCRtpSender__rtp_timestamp", None)
            origin = None if stamp is None else (stamp - self._pts) % 2**32
            self.clocks.pop(0).send(json.dumps({"origin": origin}))
        self._pts, data = await self._viewer.get()
        packet = av.Packet(data)
        packet.pts, packet.time_base = self._pts, Fraction(1, CLOCK)
        return packet
