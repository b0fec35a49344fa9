import { Events, Mp4Player, RtcPlayer } from "./player.js";

const $ = (id) => document.getElementById(id);
const ROOT = `/api/sessions/${encodeURIComponent(new URLSearchParams(location.search).get("session") ?? "main")}`;
const STALL_MS = 2500;
const RECONNECT_MS = 6000;

const state = { prompts: [], block: -1, playing: true, parked: false, failed: null, lastFrame: 0, frames: 0, delays: [], transport: null, recordingSince: null };
window.echo = state; // for tests and the curious

async function call(path, body) {
  const options = body === undefined ? {} : { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(ROOT + path, options).catch(() => { throw new Error("the server does not answer"); });
  const said = await answer.json();
  if (!answer.ok) throw new Error(said.detail || answer.statusText);
  return said;
}

let quiet = null;
function tell(text, bad = false) {
  const place = $("message");
  quiet ??= place.innerHTML;
  place.textContent = text;
  place.className = bad ? "bad" : "told";
  clearTimeout(tell.timer);
  tell.timer = setTimeout(() => { place.innerHTML = quiet; place.className = "muted"; }, bad ? 8000 : 4000);
}

// Run what a control does; its error is shown, and the control is disabled meanwhile.
async function act(control, work) {
  if (control.disabled) return;
  control.disabled = true;
  try { await work(); } catch (error) { tell(error.message, true); } finally { control.disabled = false; }
}

// ---------------------------------------------------------------- video

const video = $("video");
let player = null;
let about = null;
let events = null;

function connect(transport) {
  player?.close();
  state.lastFrame = performance.now();
  state.delays = [];
  state.transport = transport;
  state.first = true;
  const hooks = {
    heard: (delay) => {
      state.first = false;
      state.frames++;
      state.lastFrame = performance.now();
      if (delay !== null && delay > 0 && delay < 60000) state.delays = [...state.delays.slice(-31), delay];
    },
    lost: (why) => {
      state.reason = why;
      if (state.first && transport === "webrtc" && $("transport").value === "auto") return connect("mp4");
      setTimeout(() => connect(transport), 1000);
    },
  };
  const serverTime = (at) => events.serverTime(at);
  player = transport === "webrtc"
    ? new RtcPlayer(video, ROOT, hooks, serverTime, about)
    : new Mp4Player(video, ROOT, hooks, serverTime);
}

function choose() {
  const wanted = $("transport").value;
  connect(wanted === "mp4" || (wanted === "auto" && !("RTCPeerConnection" in window)) ? "mp4" : "webrtc");
}

const median = (values) => [...values].sort((a, b) => a - b)[values.length >> 1];

// Whether no pictures are expected: their absence is no reason to connect again.
const isStill = () => state.failed || !state.playing || state.parked || document.hidden;

function watchConnection() {
  const age = performance.now() - state.lastFrame;
  const name = state.transport === "webrtc" ? "WebRTC" : "MP4";
  const slow = Math.max(STALL_MS, 4000 / (state.fps || 16));
  const chip = $("connection");
  let [look, text] = ["good", name];
  if (state.failed) [look, text] = ["bad", "stopped"];
  else if (state.away) [look, text] = ["bad", "server away"];
  else if (state.parked) [look, text] = ["warn", "parked"];
  else if (!state.playing) [look, text] = ["warn", "paused"];
  else if (age > slow) [look, text] = ["warn", `${state.first ? "connecting" : "no picture for"} ${Math.round(age / 1000)} s`];
  else if (state.first) [look, text] = ["warn", "connecting"];
  else if (state.delays.length) text = `${name} · ${Math.round(median(state.delays))} ms`;
  chip.className = `chip ${look}`;
  chip.lastElementChild.textContent = text;
  $("live").classList.toggle("on", look === "good");
  $("live").lastChild.textContent = look === "good" ? "Live" : text;
  const notice = state.parked ? "The video was stored to make room for others. Play brings it back." : state.failed ? `The video has ended: ${state.failed}. Restart it, or resume a snapshot.`
    : state.playing && age > slow && !document.hidden ? "Waiting for the next picture…" : "";
  $("notice").hidden = !notice;
  $("notice").textContent = notice;
  if (!isStill() && age > (state.first && state.transport === "webrtc" ? 4000 : RECONNECT_MS)) {
    if (state.first && $("transport").value === "auto") connect(state.transport === "webrtc" ? "mp4" : "webrtc");
    else connect(state.transport);
  }
  if (state.recordingSince) {
    const seconds = Math.floor((Date.now() - state.recordingSince) / 1000);
    $("recording").lastElementChild.textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  }
  showPrompts();
}

// ---------------------------------------------------------------- prompts

function showPrompts() {
  const current = state.prompts.findLast((prompt) => prompt.block <= state.block);
  const rows = state.prompts.slice(-30).reverse().map((prompt) => {
    const row = document.createElement("li");
    const time = document.createElement("time");
    time.textContent = new Date(prompt.asked * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
    const text = document.createElement("span");
    text.className = "text";
    text.textContent = prompt.text;
    const when = document.createElement("span");
    when.className = "when";
    const soon = prompt.block > state.block;
    row.className = soon ? "soon" : prompt === current ? "now" : "past";
    const left = prompt.due === undefined ? null : Math.max(0, (prompt.due - performance.now()) / 1000);
    when.textContent = soon ? (left === null ? `at block ${prompt.block}` : `shows in ${left < 10 ? left.toFixed(1) : Math.round(left)} s`)
      : `${prompt === current ? "since " : ""}block ${prompt.block}`;
    if (prompt.over) when.textContent += `, over ${prompt.over}`;
    row.append(time, text, when);
    return row;
  });
  $("prompts").replaceChildren(...rows);
}

$("compose").addEventListener("submit", (event) => {
  event.preventDefault();
  act(event.submitter ?? $("compose").lastElementChild, async () => {
    const over = Number($("blend").value) || null;
    const taken = await call("/prompts", { text: $("text").value, over });
    $("text").value = "";
    const known = about.words ?? [], words = new Set(taken.text.toLowerCase().match(/[\p{L}\p{N}]+/gu));
    const unknown = known.length ? [...words].filter((word) => !known.includes(word)) : [];
    const but = unknown.length ? ` The model does not know ${unknown.join(", ")}; it knows ${known.join(", ")}.` : "";
    tell(`Begins with block ${taken.block}, in ${taken.shows_in.toFixed(1)} s.${but}`);
  });
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("compose").requestSubmit(); }
  if (event.key === "Escape") $("text").blur();
});

// ---------------------------------------------------------------- figures

const CHARTS = [["fps", "Frames / s", 1], ["block_seconds", "Block, s", 2], ["memory_norm", "Memory norm", 3], ["gate_mean", "Gate", 3]];
const charts = new Map(CHARTS.map(([key, name, digits]) => {
  const box = document.createElement("div");
  box.className = "chart";
  box.innerHTML = `<span>${name}</span><b>–</b><canvas></canvas>`;
  $("charts").append(box);
  return [key, { box, digits, values: [] }];
}));

function draw({ box, digits, values }) {
  const known = values.filter((value) => value !== null);
  const last = values.at(-1);
  box.querySelector("b").textContent = last == null ? "–" : last.toFixed(digits);
  const canvas = box.querySelector("canvas");
  const scale = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = width * scale;
  canvas.height = height * scale;
  if (known.length < 2) return;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  let [low, high] = [Math.min(...known), Math.max(...known)];
  const room = Math.max((high - low) * 0.15, Math.abs(high) * 0.02, 1e-9);
  [low, high] = [low - room, high + room];
  const style = getComputedStyle(document.documentElement);
  pen.strokeStyle = style.getPropertyValue("--line");
  pen.strokeRect(0.5, 0.5, width - 1, height - 1);
  pen.strokeStyle = style.getPropertyValue("--accent");
  pen.lineWidth = 1.6;
  pen.beginPath();
  known.forEach((value, i) => pen.lineTo(2 + i * (width - 4) / (known.length - 1), height - height * (value - low) / (high - low)));
  pen.stroke();
}

const bytes = (n) => (n < 1e6 ? `${(n / 1e3).toFixed(0)} kB` : n < 1e9 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e9).toFixed(1)} GB`);

function showFigures(figures) {
  state.fps = figures.fps;
  for (const [key, chart] of charts) {
    chart.values = [...chart.values.slice(-119), figures[key] ?? null];
    draw(chart);
  }
  const gpu = figures.gpu_bytes && `${bytes(figures.gpu_bytes)} of ${bytes(figures.gpu_total_bytes)}`;
  const rows = {
    Block: figures.block, Frame: figures.frame, "Decoding, s": figures.decode_seconds?.toFixed(3),
    Shift: figures.shift, "Newest id": figures.newest_id, Memory: state.memory, Seed: state.seed, Viewers: state.viewers,
    Device: about.device, "GPU memory": gpu,
  };
  $("figures").replaceChildren(...Object.entries(rows).filter(([, value]) => value != null).flatMap(([name, value]) => {
    const [term, data] = [document.createElement("dt"), document.createElement("dd")];
    [term.textContent, data.textContent] = [name, value];
    return [term, data];
  }));
  $("position").textContent = `block ${figures.block}`;
}

async function refresh() {
  const figures = await call("/figures");
  setParked(figures.state === "parked");
  if (state.parked) return figures;
  Object.assign(state, { viewers: figures.viewers, memory: figures.memory, seed: figures.seed, failed: figures.failure });
  setPlaying(figures.state !== "paused");
  setRecording(figures.recording);
  return figures;
}

async function refreshAll() {
  const figures = await refresh();
  if (state.parked) return;
  state.prompts = (await call("/prompts")).prompts;
  state.block = figures.block ?? -1;
  $("memory").value = figures.memory;
  $("seed").value = figures.seed;
  await Promise.all([listSnapshots(), listRecordings()]);
  showPrompts();
}

// ---------------------------------------------------------------- controls

function setParked(parked) {
  if (state.parked === parked) return;
  state.parked = parked;
  if (!parked) state.lastFrame = performance.now();
  setPlaying(state.playing);
}

function setPlaying(playing) {
  if (playing && isStill()) state.lastFrame = performance.now();
  state.playing = playing;
  const still = !playing || state.parked;
  $("pause").textContent = still ? "Play" : "Pause";
  $("pause").setAttribute("aria-pressed", String(still));
  document.body.classList.toggle("still", still);
}

function setRecording(name) {
  state.recordingSince = name ? state.recordingSince ?? Date.now() : null;
  $("recording").hidden = !name;
  $("record").textContent = name ? "Stop recording" : "Record";
  $("record").setAttribute("aria-pressed", String(Boolean(name)));
}

async function listSnapshots() {
  const { snapshots } = await call("/snapshots");
  const options = snapshots.map(({ name, block, bytes: size }) => new Option(`block ${block} · ${name.slice(9, 11)}:${name.slice(11, 13)} UTC · ${bytes(size)}`, name));
  $("snapshots").replaceChildren(...(options.length ? options : [new Option("none yet", "")]));
  $("resume").lastElementChild.disabled = !options.length;
}

async function listRecordings() {
  const { recordings } = await call("/recordings");
  const rows = recordings.slice(0, 6).map(({ name, bytes: size }) => {
    const [row, link, weight] = ["li", "a", "span"].map((tag) => document.createElement(tag));
    link.href = `${ROOT}/recordings/${name}`;
    link.download = link.textContent = name;
    weight.className = "muted";
    weight.textContent = bytes(size);
    row.append(link, weight);
    return row;
  });
  const none = document.createElement("li");
  none.className = "muted";
  none.textContent = "None yet: Record keeps what is shown.";
  $("recordings").replaceChildren(...(rows.length ? rows : [none]));
}

const DO = {
  pause: () => call("/pause", { paused: state.playing && !state.parked }),
  snapshot: () => call("/snapshots", {}),
  record: async () => {
    if (!state.recordingSince) return call("/recordings", {});
    const { name } = await call("/recordings/stop", {});
    await listRecordings();
    $("recordings").querySelector(`a[download="${name}"]`)?.click();
  },
  full: () => (document.fullscreenElement ? document.exitFullscreen() : $("stage").requestFullscreen()),
  theme: () => {
    const theme = document.documentElement.dataset.theme === "light" ? "dark" : "light";
    document.documentElement.dataset.theme = localStorage.theme = theme;
    charts.forEach(draw);
  },
};
for (const name of Object.keys(DO)) $(name).addEventListener("click", () => act($(name), DO[name]));
$("stage").addEventListener("dblclick", DO.full);
const KEYS = { " ": "pause", k: "pause", r: "record", s: "snapshot", f: "full", t: "theme" };
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select, button")) return;
  if (event.key === "/") { event.preventDefault(); $("text").focus(); }
  const name = KEYS[event.key.toLowerCase()];
  if (name) { event.preventDefault(); act($(name), DO[name]); }
});
$("restart").addEventListener("submit", (event) => {
  event.preventDefault();
  act(event.submitter, async () => {
    // As a text: a seed may be larger than JavaScript's numbers are exact.
    await call("/restart", { seed: $("seed").value, memory: $("memory").value || null });
    tell("A new video has begun.");
  });
});
$("resume").addEventListener("submit", (event) => {
  event.preventDefault();
  act(event.submitter, async () => {
    const taken = await call("/resume", { snapshot: $("snapshots").value });
    tell(`Goes on with block ${taken.block}.`);
  });
});
$("transport").addEventListener("change", () => { localStorage.transport = $("transport").value; choose(); });
addEventListener("pagehide", () => player?.close());  // or the server would wait for a viewer who has gone
addEventListener("pageshow", (event) => { if (event.persisted) choose(); });

// ---------------------------------------------------------------- events

function heard(event) {
  state.away = event.type === "away";
  if (!["away", "hello"].includes(event.type)) setParked(event.type === "parked");
  switch (event.type) {
    case "hello": refreshAll().catch(() => {}); break;
    case "block":
      state.block = event.block;
      state.failed = null;
      if (!state.playing) setPlaying(true);
      showFigures(event);
      break;
    case "prompt":
      state.prompts.push({ ...event, due: performance.now() + 1000 * event.shows_in });
      break;
    case "paused": case "playing": setPlaying(event.type === "playing"); break;
    case "snapshot": tell("Snapshot written."); listSnapshots(); break;
    case "recording": setRecording(event.name); break;
    case "recorded":
      setRecording(null);
      listRecordings();
      if (event.error) tell(event.error, true);
      break;
    case "restarted": case "resumed": charts.forEach((chart) => { chart.values = []; }); refreshAll().catch(() => {}); break;
    case "failed": state.failed = event.error; break;
  }
  showPrompts();
}

document.documentElement.dataset.theme = localStorage.theme ?? (matchMedia("(prefers-color-scheme: light)").matches ? "light" : "dark");
$("transport").value = localStorage.transport ?? "auto";
while (!about) {
  try { about = await call(""); } catch (error) { // it may wait for a free machine
    $("notice").hidden = false;
    $("notice").textContent = error.message;
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}
$("model").textContent = `${about.model} · ${about.size.join("×")}`;
$("stage").style.setProperty("--ratio", about.size[0] / about.size[1]);
$("memory").replaceChildren(...about.memories.map((mode) => new Option(mode, mode)));
events = new Events(ROOT, heard);
choose();
setInterval(watchConnection, 250);
setInterval(() => refresh().catch(() => {}), 5000);
