// The two ways in which the video reaches a <video>: WebRTC, and fragmented MP4 over a WebSocket.
// A player calls heard(delay) for every frame that is shown, delay in milliseconds or null; and lost(why) once at its end.

const socketAddress = (path) => `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}${path}`;

class Player {
  constructor(video, root, hooks) {
    Object.assign(this, { video, root, ...hooks, over: false });
    const watch = (now, frame) => {
      if (this.over) return;
      this.heard(this.delay(frame), frame);
      video.requestVideoFrameCallback(watch);
    };
    video.requestVideoFrameCallback(watch);
  }

  end(why) {
    if (this.over) return;
    this.over = true;
    this.release();
    this.lost(why);
  }

  close() {
    this.over = true;
    this.release();
  }
}

export class RtcPlayer extends Player {
  constructor(video, root, hooks, serverTime, about) {
    super(video, root, hooks);
    Object.assign(this, { serverTime, epoch: about.epoch });
    this.peer = new RTCPeerConnection({ iceServers: about.ice_servers });
    // The server says which time stamp its epoch has, so that a picture's tells when it was made.
    this.peer.createDataChannel("clock").onmessage = (message) => { this.origin = JSON.parse(message.data).origin; };
    this.connect().catch((error) => this.end(String(error.message || error)));
  }

  async connect() {
    const peer = this.peer;
    const transceiver = peer.addTransceiver("video", { direction: "recvonly" });
    const codecs = RTCRtpReceiver.getCapabilities("video").codecs;
    const wanted = codecs.filter((codec) => codec.mimeType === "video/H264" && /packetization-mode=1/.test(codec.sdpFmtpLine));
    if (!wanted.length) throw new Error("this browser has no H.264 for WebRTC");
    // Before the offer: later it has no effect.
    transceiver.setCodecPreferences([...wanted, ...codecs.filter((codec) => codec.mimeType === "video/rtx")]);
    if ("jitterBufferTarget" in transceiver.receiver) transceiver.receiver.jitterBufferTarget = 0;
    peer.ontrack = (event) => {
      this.video.srcObject = new MediaStream([event.track]);
      this.video.play().catch(() => {});
    };
    peer.onconnectionstatechange = () => {
      if (["failed", "closed"].includes(peer.connectionState)) this.end("the connection is lost");
    };
    await peer.setLocalDescription(await peer.createOffer());
    await new Promise((resolve) => {
      if (peer.iceGatheringState === "complete") return resolve();
      peer.onicegatheringstatechange = () => peer.iceGatheringState === "complete" && resolve();
      setTimeout(resolve, 1500);
    });
    const answer = await fetch(`${this.root}/offer`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ sdp: peer.localDescription.sdp }),
    });
    const said = await answer.json();
    if (!answer.ok) throw new Error(said.detail);
    await peer.setRemoteDescription(said);
  }

  delay(frame) {
    if (this.origin == null || frame.rtpTimestamp === undefined) return null;
    const now = this.serverTime(frame.expectedDisplayTime) - this.epoch;
    const age = now - (frame.rtpTimestamp - this.origin) / 90000;
    const turn = 2 ** 32 / 90000; // seconds after which time stamps begin again
    return 1000 * (age - turn * Math.round(age / turn));
  }

  release() {
    this.peer.close();
    this.video.srcObject = null;
  }
}

export class Mp4Player extends Player {
  constructor(video, root, hooks, serverTime) {
    super(video, root, hooks);
    this.serverTime = serverTime;
    this.waiting = [];
    this.socket = new WebSocket(socketAddress(`${root}/video`));
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = (event) => this.take(event.data);
    this.socket.onclose = (event) => this.end(event.reason || "the connection is lost");
  }

  take(data) {
    if (typeof data === "string") {
      const { codec, epoch } = JSON.parse(data);
      const type = `video/mp4; codecs="${codec}"`;
      const Source = window.ManagedMediaSource || window.MediaSource;
      if (!Source || !Source.isTypeSupported(type)) return this.end(`this browser does not play ${type}`);
      this.epoch = epoch;
      this.source = new Source();
      this.video.disableRemotePlayback = true;
      this.source.addEventListener("sourceopen", () => {
        this.buffer = this.source.addSourceBuffer(type);
        this.buffer.addEventListener("updateend", () => this.appended());
        this.append();
      }, { once: true });
      this.video.src = this.address = URL.createObjectURL(this.source);
    } else {
      this.waiting.push(data);
      this.append();
    }
  }

  append() {
    if (this.over || !this.buffer || this.buffer.updating || !this.waiting.length) return;
    try {
      this.buffer.appendBuffer(this.waiting.shift());
    } catch (error) {
      this.end(error.message);
    }
  }

  appended() {
    const { video, buffer } = this;
    if (this.over || this.source.readyState !== "open") return;
    const ranges = buffer.buffered;
    if (ranges.length) {
      const start = ranges.start(0);
      const end = ranges.end(ranges.length - 1);
      if (!this.began) {
        this.began = true;
        video.currentTime = start;
        video.play().catch(() => {});
      } else if (end - video.currentTime > 0.8 || video.currentTime < ranges.start(ranges.length - 1)) {
        video.currentTime = end - 0.02; // after a pause, or a background tab
      } else {
        video.playbackRate = end - video.currentTime > 0.12 ? 1.1 : 1;
      }
      if (video.currentTime - start > 20) return buffer.remove(0, video.currentTime - 10);
    }
    this.append();
  }

  delay(frame) {
    return 1000 * (this.serverTime(frame.expectedDisplayTime) - this.epoch - frame.mediaTime);
  }

  release() {
    this.socket.onclose = null;
    this.socket.close();
    this.video.playbackRate = 1;
    this.video.removeAttribute("src");
    this.video.load();
    if (this.address) URL.revokeObjectURL(this.address);
  }
}

// Events of the session, connected again whenever they end; and the server's clock.
export class Events {
  constructor(root, heard) {
    Object.assign(this, { root, heard, offset: null, best: Infinity });
    this.open();
    setInterval(() => this.ping(), 3000);
  }

  open() {
    this.socket = new WebSocket(socketAddress(`${this.root}/events`));
    this.socket.onopen = () => {
      this.best = Infinity;
      for (let i = 0; i < 4; i++) setTimeout(() => this.ping(), 60 * i);
    };
    this.socket.onmessage = (message) => {
      const event = JSON.parse(message.data);
      if (!("pong" in event)) return this.heard(event);
      const now = performance.now();
      const trip = now - event.pong;
      if (trip > this.best + 2) return; // the quickest answer tells the clock best
      this.best = trip;
      this.offset = event.now - (event.pong + trip / 2) / 1000;
    };
    this.socket.onclose = () => {
      this.heard({ type: "away" });
      setTimeout(() => this.open(), 1000);
    };
  }

  ping() {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ ping: performance.now() }));
    this.best += 1; // clocks drift apart
  }

  // The server's time, in seconds, at a time of performance.now().
  serverTime(at) {
    return this.offset === null ? NaN : this.offset + at / 1000;
  }
}
