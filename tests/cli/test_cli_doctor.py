"""``doctor``: facts, advice, exit code."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from echo_rt.cli import doctor
from echo_rt.errors import BackendError
from echo_rt.ops.backends import BACKEND_VARIABLE, available_backends
from echo_rt.utils.build_info import BuildInfo, __version__


def facts_of(outcome) -> dict[str, dict[str, str]]:
    return {fact["name"]: fact for fact in outcome.json["facts"]}


def test_here_generate_can_run(echo_rt):
    outcome = echo_rt("doctor", "--json")
    facts = facts_of(outcome)
    assert (outcome.code, outcome.json["ok"]) == (0, True)
    assert facts["Python"]["value"] == sys.version.split()[0]
    assert facts["torch"]["value"].startswith(importlib.import_module("torch").__version__)
    assert facts["recipes"]["value"].startswith("echo-infinity-short, echo-infinity-long, ")
    assert facts["H.264 encoder libx264"]["value"].startswith("works")
    here = {f"backend {name}" for name, state in available_backends().items() if state == "available"}
    assert {name for name in facts if name.startswith("backend ")} >= here
    assert all(fact["advice"] for fact in facts.values() if fact["status"] != "ok")


def test_the_page_says_the_same(echo_rt):
    page = echo_rt("doctor").out
    for fact in echo_rt("doctor", "--json").json["facts"]:
        assert fact["name"] in page
    assert page.endswith("generate can run\n")


def test_what_is_wrong_comes_first_with_its_remedy(echo_rt, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    lines = [" ".join(line.split()) for line in echo_rt("doctor").out.splitlines()]
    assert lines[0] == "what keeps generate from running"
    assert lines[1].startswith("✗ av") and lines[2] == "-> pip install av"
    assert lines[3] == "what could be better"
    remedies = lines[: lines.index("system")]
    assert "-> optional: pip install 'echo-rt[gguf]'" in remedies
    assert not any("->" in line for line in lines[len(remedies) :])


def test_what_only_a_gpu_can_use_is_left_out_without_one(echo_rt, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor, "_driver", lambda: iter(()))
    facts = facts_of(echo_rt("doctor", "--json"))
    assert {"sdpa-cudnn", "flash-attn-2", "kernel-hopper", "NVIDIA driver", "backend cuda"} & set(facts) == set()
    assert "NVIDIA GPU" in facts["torch sees"]["advice"]


def test_a_gpu_that_torch_cannot_use(echo_rt, monkeypatch):
    """Its driver answers: then the backend for it and the way to get it are listed."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor, "_driver", lambda: iter([doctor.Fact("board 0", "Imaginary 9000")]))
    monkeypatch.setattr("echo_rt.ops.backends.available_backends", lambda: {"torch": "available", "cuda": "build it"})
    facts = facts_of(echo_rt("doctor", "--json"))
    assert (facts["backend cuda"]["status"], facts["backend cuda"]["advice"]) == ("absent", "build it")


@pytest.mark.parametrize("command", ["generate", "soak"])
def test_without_torch_the_commands_point_at_doctor(command, tmp_path):
    arguments = {"generate": ["--prompt", "a fox", "-o", "v.mp4"], "soak": ["--out", "s", "--blocks", "1"]}[command]
    program = "import sys; sys.modules['torch'] = None; from echo_rt.cli.main import main; sys.exit(main())"
    line = [sys.executable, "-c", program, command, "--model", "m", *arguments]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    loading, error = done.stderr.splitlines()
    assert done.returncode == 1 and loading == "echo-rt: loading m ...", done.stderr
    assert "torch" in error and "echo-rt doctor shows what is missing" in done.stderr
    doctor_line = [sys.executable, "-c", program, "doctor"]
    found = subprocess.run(doctor_line, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 1 and found.stderr == ""
    assert found.stdout.splitlines()[0] == "what keeps generate from running"
    assert "pip install torch" in found.stdout.splitlines()[2]


@pytest.mark.parametrize(
    ("chosen", "code", "default"),
    [
        ("torch", 0, f"torch: {BACKEND_VARIABLE} names it"),
        ("opencl", 1, None),
        ("cuda", 1, None),
        ("", 0, "torch: the device is cpu"),
    ],
)
def test_the_default_backend(echo_rt, monkeypatch, chosen, code, default):
    """generate takes it where no other is named, and ends where the environment's is not to be had."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv(BACKEND_VARIABLE, chosen)
    outcome = echo_rt("doctor", "--json")
    assert outcome.code == code
    facts = facts_of(outcome)
    found = facts.get(BACKEND_VARIABLE)
    assert (found is not None) == bool(chosen)
    if found is not None:
        assert (found["value"], found["status"] == "ok") == (chosen, code == 0)
        assert ("unset it" in found["advice"]) == bool(code)
    assert ("default backend" in facts) == (default is not None)
    if default is not None:
        assert facts["default backend"]["value"] == default and facts["default backend"]["status"] == "ok"


def test_the_default_backend_of_a_gpu(monkeypatch):
    """The kernels; where they do not run on it, torch, and what to do about that."""
    import torch

    from echo_rt.ops.backends import Backend

    answers = [
        Backend(SimpleNamespace(name="cuda"), "the kernels are built for cuda:0"),
        Backend(SimpleNamespace(name="torch"), "cuda:0 is sm_75; install again", fallback=True),
    ]
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("echo_rt.ops.backends.choose_backend", lambda named, device: answers.pop(0))
    kernels, torchs = (list(doctor._backends())[-1] for _ in range(2))
    assert (kernels.value, kernels.status) == ("cuda: the kernels are built for cuda:0", "ok")
    assert (torchs.value, torchs.status, torchs.advice) == ("torch: cuda:0 is sm_75", "absent", "install again")


@pytest.mark.parametrize(
    ("module", "name", "install", "code"),
    [
        ("av", "av", "av", 1),
        ("rich", "rich", "rich", 0),
        ("nvtx", "nvtx", "'echo-rt[profile]'", 0),
        ("matplotlib", "matplotlib", "'echo-rt[soak]'", 0),
        ("aiortc", "aiortc", "'echo-rt[serve]'", 0),
        ("httpx", "httpx", "'echo-rt[client]'", 0),
        ("ray", "ray", "'echo-rt[ray]'", 0),
    ],
)
def test_a_missing_package(echo_rt, monkeypatch, module, name, install, code):
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    outcome = echo_rt("doctor", "--json")
    assert outcome.code == code
    fact = facts_of(outcome)[name]
    assert fact["status"] == ("missing" if code else "absent")
    assert f"pip install {install}" in fact["advice"]
    page = echo_rt("doctor")
    assert page.code == code, "the page needs none of the packages"
    assert page.out.splitlines()[-1] == (f"generate cannot run: {name}" if code else "generate can run")


STREAM = """
import echo_rt, torch
with echo_rt.Runtime.from_pretrained(model, device="cpu", memory="off") as runtime:
    with runtime.stream(prompt_embeds=torch.zeros(5, runtime.config.transformer.text_dim)) as stream:
        assert [next(stream).index for _ in range(2)] == [0, 1]
    try:
        runtime.stream("a red fox")
    except echo_rt.BackendError as error:
        assert "cleaning a prompt needs the package ftfy" in str(error), error
    else:
        raise AssertionError("who cleaned the prompt?")
"""
COMMAND = "from echo_rt.cli.main import main; assert main({}) == {}"
COLLECT = """
import pytest
assert pytest.main(["--collect-only", "-q", "-m", "cuda", "-p", "no:cacheprovider", "--assert=plain", tests]) == 0
"""


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (STREAM, ""),
        (COMMAND.format('["verify", "--device", "cpu", tests + "/golden/rollout_small"]', 0), ""),
        (COMMAND.format('["generate", "--model", model, "--prompt", "a fox", "-o", "fox.mp4"]', 2), "the package av:"),
        (COLLECT, ""),
    ],
    ids=["stream", "verify", "generate", "tests for GPUs are collected"],
)
def test_torch_numpy_and_safetensors_alone(program, said, small_model, golden_dir, tmp_path):
    """A GPU machine may have no other package; what needs one names it when it is used, in one line."""
    absent = {module for module, *_ in doctor._DEPENDENCIES} - {"torch", "numpy", "safetensors", "msgspec"}
    absent |= {"tokenizers", "huggingface_hub", "diffusers", "accelerate", "fastapi", "uvicorn", "PIL", "wcwidth"}
    absent |= {"pytest_benchmark", "xdist", "einops"}
    before = f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"  # importing one of them fails
    before += f"model, tests = {str(small_model)!r}, {str(golden_dir.parent)!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", before + program],
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stderr.splitlines() if not line.startswith("echo-rt: loading")]
    assert "Traceback" not in done.stderr and len(told) == bool(said), done.stderr
    assert said in done.stderr


def test_a_broken_package_says_why(echo_rt, monkeypatch):
    real = importlib.import_module

    def broken(name: str):
        if name == "transformers":
            raise OSError("libsomething.so: cannot open shared object file\nmore")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    outcome = echo_rt("doctor", "--json")
    assert outcome.code == 1
    assert facts_of(outcome)["transformers"]["value"].endswith("libsomething.so: cannot open shared object file")


@pytest.mark.parametrize("needed", [False, True])
def test_without_a_compiler(echo_rt, monkeypatch, needed):
    """It is missed where echo-rt has to be built again."""
    monkeypatch.setattr(doctor, "_sees_gpu", lambda: needed)
    monkeypatch.setattr(doctor.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(doctor, "build_info", lambda: BuildInfo(__version__, "gcc", 17, ()))
    facts = facts_of(echo_rt("doctor", "--json"))
    for name in ("nvcc", "C++ compiler"):
        assert (name in facts) == needed
        if needed:
            assert facts[name]["value"] == "not found" and "needed only" in facts[name]["advice"]


def test_without_the_compiled_part(echo_rt, monkeypatch):
    from echo_rt.errors import BackendError

    def absent():
        raise BackendError("no echo_rt._C")

    monkeypatch.setattr(doctor, "build_info", absent)
    outcome = echo_rt("doctor", "--json")
    assert (outcome.code, outcome.json["ok"]) == (1, False)
    fact = facts_of(outcome)["compiled part"]
    assert (fact["status"], fact["value"]) == ("missing", "no echo_rt._C")
    assert "generate needs it" in fact["advice"] and "pip install ." in fact["advice"]


@pytest.mark.parametrize(
    ("number", "value", "status"),
    [
        (90701, "9.7.1 (90701)", "ok"),
        (90800, "9.8.0 (90800)", "absent"),
        (91002, "9.10.2 (91002)", "absent"),
        (91500, "9.15.0 (91500)", "ok"),
        (None, "not there", "absent"),
    ],
)
def test_the_cudnn_of_a_gpu(monkeypatch, number, value, status):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    (fact,) = (fact for fact in doctor._torch() if fact.name == "cuDNN")
    assert (fact.value, fact.status) == (value, status)
    assert bool(fact.advice) == (status != "ok")
    assert number is None or status == "ok" or "faulty 16-bit 3-D convolutions" in fact.advice


def test_an_encoder_that_is_not_there(echo_rt, monkeypatch):
    from echo_rt.output import video

    def refuse():
        raise BackendError("libx264: no such encoder")

    monkeypatch.setattr(video, "check_encoding", refuse)
    outcome = echo_rt("doctor", "--json")
    assert outcome.code == 1
    assert "PyAV" in facts_of(outcome)["H.264 encoder libx264"]["advice"]


# -- attention ---------------------------------------------------------------------------------------------------


def attention_facts(monkeypatch, states: dict[str, str], cache=None) -> dict[str, doctor.Fact]:
    """What is said of a GPU on which the kinds have these states."""
    import torch

    import echo_rt.attention

    properties = SimpleNamespace(name="Imaginary 9000", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr("echo_rt.autotune.tuner.Tuner.available", lambda self: states)
    monkeypatch.setattr(echo_rt.attention, "cache_folder", lambda: cache)
    return {fact.name: fact for fact in doctor._autotuned(*doctor._ATTENTION)}


def test_attention_on_a_cpu(echo_rt):
    from echo_rt.attention import implementations
    from echo_rt.ops.backends import load_ops

    facts = facts_of(echo_rt("doctor", "--json"))
    names = {kind.name for kind in implementations(load_ops("torch"))}
    shown = {name for name, fact in facts.items() if fact["group"] == "attention"} - {"chosen"}
    assert {"sdpa", "products"} <= shown - {"converted"} < names, "those of a GPU are left out"
    assert facts["converted"]["value"] == "works on cpu", "that of a float8 cache"
    assert facts["sdpa"]["value"] == "works on cpu"
    assert facts["chosen"]["value"] == "sdpa, converted: torch's own on a CPU"


def test_attention_that_is_not_there_comes_with_its_remedy(monkeypatch):
    states = {"sdpa-cudnn": "available", "flash-attn-2": "it is not installed; pip install flash-attn"}
    facts = attention_facts(monkeypatch, states)
    assert (facts["sdpa-cudnn"].status, facts["sdpa-cudnn"].value) == ("ok", "works on cuda:0")
    library = facts["flash-attn-2"]
    assert (library.status, library.value, library.advice) == (
        "absent",
        "it is not installed",
        "pip install flash-attn",
    )
    assert facts["chosen"].status == "absent" and "set ECHO_RT_CACHE_DIR" in facts["chosen"].advice


def test_the_attention_that_was_chosen_and_why(monkeypatch, tmp_path):
    import torch

    from echo_rt.attention import CACHE, AttentionShapes, implementations
    from echo_rt.autotune.cache import Case, Entry, machine_facts
    from echo_rt.ops.backends import load_ops

    cache = tmp_path / "attention"
    facts = attention_facts(monkeypatch, {"sdpa-cudnn": "available"}, cache)
    assert (facts["chosen"].value, facts["chosen"].status) == ("not measured yet", "absent")
    assert "when a model is loaded" in facts["chosen"].advice and "ECHO_RT_CACHE_DIR" not in facts["chosen"].advice
    machine = machine_facts(
        torch.device("cuda", 0), {kind.name: kind.version() for kind in implementations(load_ops("torch"))}
    )
    shapes = AttentionShapes(queries=5, keys=7, heads=2, head_dim=8)
    for known, winner in ((machine, "sdpa-cudnn"), ({**machine, "torch": "1.0"}, "sdpa-flash")):
        CACHE.remember(
            cache, Entry(Case(known, "bfloat16", shapes), winner, {"sdpa-cudnn": 0.25, "sdpa-flash": 0.5}, {})
        )
    facts = attention_facts(monkeypatch, {"sdpa-cudnn": "available"}, cache)
    assert facts["chosen"].value == (
        "sdpa-cudnn: for 5 queries, 7 keys, 2 heads of 8 in bfloat16, "
        "fastest on Imaginary 9000: sdpa-cudnn 0.250 ms, sdpa-flash 0.500 ms"
        f" (remembered in {cache})"
    ), "and not that of another torch"


def test_no_attention_at_all(monkeypatch):
    facts = attention_facts(monkeypatch, {"sdpa-math": "it does not compute; choose another"})
    assert facts["any of them"].status == "missing" and "chosen" not in facts


@pytest.mark.parametrize("family", [doctor._ATTENTION, doctor._LINEAR, doctor._CONVOLUTION])
def test_a_gpu_that_fails_is_a_finding(monkeypatch, family):
    def full(tuner):
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr("echo_rt.autotune.tuner.Tuner.available", full)
    (fact,) = doctor._autotuned(*family)
    assert (fact.status, fact.value) == ("missing", "CUDA error: out of memory")


# -- convolutions ------------------------------------------------------------------------------------------------


def test_convolutions_on_a_cpu(echo_rt):
    facts = [fact for fact in echo_rt("doctor", "--json").json["facts"] if fact["group"] == "convolution"]
    values = [(fact["name"], fact["value"]) for fact in facts]
    assert ("conv3d", "works on cpu") in values and ("phases", "works on cpu") in values
    chosen = [value for name, value in values if name == "convolutions chosen"]
    assert chosen == ["three-products, enlarged: torch's own on a CPU"]


def test_the_convolutions_that_were_chosen(monkeypatch, tmp_path):
    import torch

    import echo_rt.convolution
    from echo_rt.autotune.cache import Case, Entry, machine_facts
    from echo_rt.convolution import CACHE, ConvolutionShape, implementations

    properties = SimpleNamespace(name="Imaginary 9000", major=9, minor=0)
    cache = tmp_path / "convolution"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr("echo_rt.autotune.tuner.Tuner.available", lambda self: {"conv3d": "available"})
    monkeypatch.setattr(echo_rt.convolution, "cache_folder", lambda: cache)
    monkeypatch.setattr("echo_rt.ops.backends.available_backends", lambda: {"torch": "available", "cuda": "no"})

    def chosen() -> doctor.Fact:
        return {fact.name: fact for fact in doctor._autotuned(*doctor._CONVOLUTION)}["convolutions chosen"]

    assert (chosen().value, chosen().status) == ("not measured yet", "absent")
    for width, winner, version in (
        (4, "conv3d", None),
        (5, "kernel", None),
        (6, "kernel", None),
        (9, "kernel", None),
        (10, "kernel", None),
        (7, "kernel", "other"),
    ):
        family = {kind.name: kind.version() for kind in implementations() if not kind.enlarges}
        machine = machine_facts(torch.device("cuda", 0), family) | ({} if version is None else {"torch": version})
        shape = ConvolutionShape(4, 4, width, 8, 8, (3, 3, 3))
        CACHE.remember(cache, Entry(Case(machine, "bfloat16", shape), winner, {winner: 0.5}, {}))
    assert chosen().value == f"kernel for 4, conv3d for 1 of 5 shapes (remembered in {cache})", (
        "not those of another torch"
    )


def test_a_convolution_of_both_kinds_is_listed_once_unless_it_differs(monkeypatch):
    def states(tuner):
        return {"a": "available", "b": "available" if tuner.shapes.enlarge else "gone; get it"}

    monkeypatch.setattr("echo_rt.autotune.tuner.Tuner.available", states)
    monkeypatch.setattr("echo_rt.ops.backends.available_backends", lambda: {"torch": "available", "cuda": "no"})
    monkeypatch.setattr(doctor, "_checked", lambda name, value, ok, *_: doctor.Fact(name, f"{ok}"))
    facts = {fact.name: fact.value for fact in doctor._autotuned(*doctor._CONVOLUTION)}
    assert (facts["a"], facts["b (enlarging)"]) == ("True", "True") and "b" not in facts, "gone on a CPU is left out"
