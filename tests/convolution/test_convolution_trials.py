"""What a trial makes of a convolution: right or wrong, and how long it takes."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from naive_convolution import inputs, naive

from echo_rt.autotune.tuner import ANY_DTYPE, TOLERANCES
from echo_rt.convolution import (
    ConvolutionCandidate,
    ConvolutionCheck,
    ConvolutionShape,
    exact_pixels,
    implementations,
    select_convolutions,
)
from echo_rt.errors import BackendError
from echo_rt.ops.backends import available_backends, load_ops

CPU = torch.device("cpu")
CAUSAL = ConvolutionShape(5, 9, 11, 32, 24, (3, 3, 3))
TO_RGB = ConvolutionShape(5, 9, 11, 24, 3, (3, 3, 3))
GROWING = ConvolutionShape(2, 5, 7, 32, 16, (1, 3, 3), enlarge=True)
SHAPES = [
    CAUSAL,
    TO_RGB,
    GROWING,
    ConvolutionShape(4, 6, 5, 16, 32, (3, 1, 1)),
    ConvolutionShape(3, 1, 1, 1, 1, (3, 3, 3)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_exact_pixels(shape):
    frames, weight = inputs(shape, torch.float32)
    whole = naive(frames, weight, shape)
    points = torch.cartesian_prod(*map(torch.arange, shape.out_size[:3]))
    pixels = exact_pixels(frames, weight, shape, points)
    torch.testing.assert_close(pixels, whole.flatten(0, 2), rtol=0, atol=1e-13)


def spoiled(shape: ConvolutionShape, change) -> ConvolutionCandidate:
    """The right result, in which ``change`` has done something."""
    right = next(kind for kind in implementations() if kind.enlarges == shape.enlarge)

    def prepare(weight):
        return lambda frames: change(right.prepare, frames, weight)

    return ConvolutionCandidate("spoiled", prepare, enlarges=shape.enlarge)


def without_a_tap(prepare, frames, weight):
    weight = weight.clone()
    weight[:, :, 0, -1, 0] = 0
    return prepare(weight)(frames)


def in_place(where, value):
    def change(prepare, frames, weight):
        out = prepare(weight)(frames)
        out[where] = value
        return out

    return change


def wrapped_around(prepare, frames, weight):
    """Padded with the other side instead of zeros."""
    wide = torch.cat([frames[:, :, -1:], frames, frames[:, :, :1]], dim=2)
    out = prepare(weight)(wide)
    margin = (out.shape[2] - frames.shape[2] * (out.shape[2] // wide.shape[2])) // 2
    return out[:, :, margin : out.shape[2] - margin].contiguous()


WRONG = {
    "a tap missing": without_a_tap,
    "channels mixed up": lambda prepare, frames, weight: prepare(weight.flip(0))(frames),
    "the last row": in_place((slice(None), -1), 7.0),
    "the first pixel": in_place((0, 0, 0), 7.0),
    "the last pixel": in_place((-1, -1, -1), 7.0),
    "the last frame": in_place(-1, 0.0),
    "not a number in the last pixel": in_place((-1, -1, -1), math.nan),
    "padded with the other side": wrapped_around,
    "zero": lambda prepare, frames, weight: prepare(weight)(frames) * 0,
    "another size": lambda prepare, frames, weight: prepare(weight)(frames)[:-1],
    "another layout": lambda prepare, frames, weight: (
        prepare(weight)(frames).permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    ),
    "another dtype": lambda prepare, frames, weight: prepare(weight)(frames).double(),
}


@pytest.mark.parametrize("dtype", ANY_DTYPE, ids=str)
@pytest.mark.parametrize("shape", [CAUSAL, TO_RGB, GROWING], ids=str)
def test_the_trial_tells_right_from_wrong(dtype, shape):
    trials = ConvolutionCheck(shape, CPU, dtype)
    right = [
        kind for kind in implementations() if kind.enlarges == shape.enlarge and not kind.obstacle(CPU, dtype, shape)
    ]
    assert len(right) == 2
    for kind in right:
        assert trials.error(kind) < TOLERANCES[dtype] / 2, kind.name
    for what, change in WRONG.items():
        assert trials.error(spoiled(shape, change)) > 2 * TOLERANCES[dtype], what


def test_the_trial_does_not_disturb_the_callers_random_numbers():
    state = torch.random.get_rng_state()
    trials = ConvolutionCheck(CAUSAL, CPU, torch.float32)
    trials.error(implementations()[0])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_callers_default_device_is_left_out_of_it():
    """Or every kind would be said to fail, where a program has put its own tensors on the GPU."""
    torch.set_default_device("meta")
    try:
        assert ConvolutionCheck(CAUSAL, CPU, torch.float32).error(implementations()[0]) < TOLERANCES[torch.float32]
    finally:
        torch.set_default_device(None)


class FakeCuda:
    """Streams, events and graphs that say in which order they were used and on what; a replay takes 6 ms."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[str] = []
        self.captures: list[tuple[object, object]] = []
        self.streams = 0
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                fake.log.append("record")

            def synchronize(self) -> None:
                fake.log.append("wait")

            def elapsed_time(self, end: Event) -> float:
                return 6.0

        @contextlib.contextmanager
        def graph(graph, *, pool, stream, capture_error_mode):
            assert capture_error_mode == "thread_local"
            fake.captures.append((pool, stream))
            fake.log.append("begin")
            yield
            fake.log.append("end")

        def stream(device):
            fake.streams += 1
            return SimpleNamespace(wait_stream=lambda other: None)

        for name, value in {
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: fake.log.append("replay")),
            "Event": Event,
            "Stream": stream,
            "graph_pool_handle": object,
            "current_stream": lambda device: "caller",
            "stream": lambda stream: contextlib.nullcontext(),
            "graph": graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_kinds_are_timed_in_replay_on_the_same_memory(monkeypatch):
    trials = ConvolutionCheck(ConvolutionShape(3, 2, 2, 2, 2, (3, 3, 3)), CPU, torch.float32)
    cuda = FakeCuda(monkeypatch)
    weights = []

    def kind(name: str) -> ConvolutionCandidate:
        def prepare(weight):
            weights.append(name)
            return lambda frames: cuda.log.append(name)

        return ConvolutionCandidate(name, prepare)

    watches = [trials.stopwatch(kind(name)) for name in ("a", "b")]
    begin, end = cuda.log.index("begin"), cuda.log.index("end")
    assert set(cuda.log[:begin]) == {"a"} and set(cuda.log[begin + 1 : end]) == {"a"}, "warmed up, then captured"
    calls = end - begin - 1
    assert weights == ["a", "b"], "prepared once"
    assert cuda.captures[0] == cuda.captures[1] and cuda.streams == 1
    cuda.log.clear()
    assert [watch() for watch in watches] == [6.0 / calls] * 2
    assert cuda.log == ["record", "replay", "record", "wait"] * 2, "nothing but replays"


def test_a_capture_that_fails_spoils_no_other(monkeypatch):
    """As torch has it: then the stream stays that of the capture, and the pool counts as being captured into."""
    cuda = FakeCuda(monkeypatch)
    current = ["caller"]

    @contextlib.contextmanager
    def on(entered):
        before, current[0] = current[0], entered
        try:
            yield
        finally:
            current[0] = before

    @contextlib.contextmanager
    def graph(graph, *, pool, stream, capture_error_mode):
        assert pool not in [pool for pool, _ in cuda.captures], "already recording to it"
        cuda.captures.append((pool, stream))
        current[0] = stream
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "stream", on)
    trials = ConvolutionCheck(ConvolutionShape(3, 2, 2, 2, 2, (3, 3, 3)), CPU, torch.float32)
    for name in ("a", "b"):
        with pytest.raises(RuntimeError, match="during capture"):
            trials.stopwatch(ConvolutionCandidate(name, lambda weight: lambda frames: None))
        assert current == ["caller"]
    assert len(cuda.captures) == 2


def on_the_cpu(shape, device, dtype) -> ConvolutionCheck:
    """The check of what is selected for a GPU."""
    return ConvolutionCheck(shape, CPU, dtype)


def test_a_capture_that_memory_does_not_suffice_for(monkeypatch):
    """It is said so, although the capture's end fails too; what was taken is free, and the next one is captured."""
    cuda = FakeCuda(monkeypatch)
    taken: list[weakref.ref] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="", major=9, minor=0))

    @contextlib.contextmanager
    def graph(graph, *, pool, stream, capture_error_mode):
        assert pool not in [pool for pool, _ in cuda.captures], "already recording to it"
        cuda.log.append("begin")
        try:
            yield
        except torch.OutOfMemoryError:
            cuda.captures.append((pool, stream))
            raise RuntimeError("operation failed due to a previous error during capture") from None

    monkeypatch.setattr(torch.cuda, "graph", graph)

    monkeypatch.setattr("echo_rt.convolution.ConvolutionCheck", on_the_cpu)

    def hungry(weight):
        def call(frames):
            if "begin" in cuda.log:
                memory = torch.empty(1)
                taken.append(weakref.ref(memory))
                raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
            return implementations()[0].prepare(weight)(frames)

        return call

    def well_fed(weight):
        cuda.log.append(f"free: {[memory() for memory in taken]}")
        return implementations()[0].prepare(weight)

    gc.disable()
    try:
        choices = select_convolutions(
            None,
            [CAUSAL],
            device=torch.device("cuda", 0),
            dtype=torch.bfloat16,
            cache=None,
            candidates=[ConvolutionCandidate("hungry", hungry), ConvolutionCandidate("well-fed", well_fed)],
        )
    finally:
        gc.enable()
    assert choices[CAUSAL].name == "well-fed"
    assert choices[CAUSAL].rejected["hungry"].endswith("Tried to allocate 2.00 GiB; free some, or choose another")
    assert "free: [None]" in cuda.log and len(taken) == 1


def faulty(kind: ConvolutionCandidate) -> ConvolutionCandidate:
    """As some releases of cuDNN are said to be: wrong where the picture is large, here in its last frame."""

    def prepare(weight):
        right = kind.prepare(weight)
        return lambda frames: torch.cat([right(frames)[:-1], right(frames)[-1:].roll(1, dims=2)])

    return dataclasses.replace(kind, prepare=prepare)


def test_a_faulty_library_is_found_out_and_not_remembered(monkeypatch, tmp_path):
    """All but the GPU: real tensors, kinds, checks and file."""
    FakeCuda(monkeypatch)
    properties = SimpleNamespace(name="Imaginary 9000", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    monkeypatch.setattr("echo_rt.convolution.ConvolutionCheck", on_the_cpu)

    def chosen(every, requested=None):
        return select_convolutions(
            requested,
            [CAUSAL, GROWING],
            device=torch.device("cuda", 0),
            dtype=torch.bfloat16,
            cache=tmp_path / "convolution",
            candidates=every,
        )

    every = [faulty(kind) if kind.name == "conv3d" else kind for kind in implementations()]
    with pytest.raises(BackendError, match="convolution 'conv3d' is not available: its result is wrong"):
        chosen(every, "conv3d")
    first, again = chosen(every), chosen(every)
    assert first[CAUSAL].name == again[CAUSAL].name == "three-products"
    assert "its result is wrong" in first[CAUSAL].rejected["conv3d"]
    assert set(first[GROWING].timings) == {"enlarged", "phases"} and "remembered" in again[GROWING].reason
    assert '"convolution": "conv3d"' not in "".join(path.read_text() for path in (tmp_path / "convolution").iterdir())


# -- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture
def real_gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device("cuda", torch.cuda.current_device())


KERNELS = load_ops("cuda") if available_backends()["cuda"] == "available" else None
ON_GPU = [kind for kind in implementations(KERNELS) if "cuda" in kind.devices]
# The last one is of the widths that some are cut for, and more than one of their tiles.
ON_GPU_SHAPES = [*SHAPES, ConvolutionShape(4, 18, 35, 64, 192, (3, 3, 3))]


def shapes_of(kind):
    """Those that it takes on some GPU."""
    return [shape for shape in ON_GPU_SHAPES if kind.enlarges == shape.enlarge and not kind.limit(shape)]


def skip_where_it_cannot(kind, device, shape):
    if obstacle := kind.obstacle(device, torch.bfloat16, shape):
        pytest.skip(obstacle)


@pytest.mark.cuda
@pytest.mark.parametrize(("kind", "shape"), [(kind, shape) for kind in ON_GPU for shape in shapes_of(kind)])
def test_numbers_on_a_gpu(real_gpu, kind, shape):
    skip_where_it_cannot(kind, real_gpu, shape)
    for dtype in kind.dtypes:
        frames, weight = inputs(shape, dtype, real_gpu)
        with torch.no_grad():
            out = kind.prepare(weight)(frames)
        assert out.shape == shape.out_size and out.dtype == dtype and out.is_contiguous()
        exact = naive(frames.cpu(), weight.cpu(), shape)
        assert (out.cpu().double() - exact).norm() / exact.norm() < TOLERANCES[dtype]


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ON_GPU, ids=lambda kind: kind.name)
def test_a_captured_call_follows_its_inputs(real_gpu, kind):
    shape = shapes_of(kind)[0]
    skip_where_it_cannot(kind, real_gpu, shape)
    frames, weight = inputs(shape, torch.bfloat16, real_gpu)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())  # which makes the inputs
    with torch.no_grad(), torch.cuda.stream(stream):
        prepared = kind.prepare(weight)
        prepared(frames)
        with torch.cuda.graph(graph, stream=stream):
            out = prepared(frames)
    frames.copy_(frames.flip(0) * 0.5)
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    exact = naive(frames.cpu(), weight.cpu(), shape)
    assert (out.cpu().double() - exact).norm() / exact.norm() < TOLERANCES[torch.bfloat16]


@pytest.mark.cuda
def test_every_thread_computes_the_same_bits(real_gpu, monkeypatch):
    """Even where the user's switch asks cuDNN to search."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    frames, weight = inputs(CAUSAL, torch.bfloat16, real_gpu)
    (conv3d,) = (kind for kind in ON_GPU if kind.name == "conv3d")

    def computed() -> torch.Tensor:
        with torch.no_grad():
            return conv3d.prepare(weight)(frames).cpu()

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        assert torch.equal(one.submit(computed).result(), other.submit(computed).result())


@pytest.mark.cuda
def test_a_gpu_is_measured_and_remembered(real_gpu, tmp_path):
    options = {
        "device": real_gpu,
        "dtype": torch.bfloat16,
        "cache": tmp_path / "convolution",
        "candidates": implementations(KERNELS),
    }
    first, again = (select_convolutions(None, [CAUSAL, GROWING], **options) for _ in range(2))
    for shape, choice in first.items():
        assert choice.timings and all(0 < time < 1000 for time in choice.timings.values())
        assert choice.name == min(choice.timings, key=choice.timings.get) == again[shape].name
        assert "remembered" in again[shape].reason and "remembered" not in choice.reason
