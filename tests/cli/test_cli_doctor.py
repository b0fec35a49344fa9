"""``doctor``: facts, advice, exit code."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest

from echo_rt.cli import doctor_checks
from echo_rt.ops import available_backends


def facts_of(outcome) -> dict[str, dict[str, str]]:
    return {fact["name"]: fact for fact in outcome.json["facts"]}


def test_here_generate_can_run(echo_rt):
    outcome = echo_rt("doctor", "--json")
    facts = facts_of(outcome)
    assert (outcome.code, outcome.json["ok"]) == (0, True)
    assert facts["Python"]["value"] == sys.version.split()[0]
    assert facts["torch"]["value"].startswith(importlib.import_module("torch").__version__)
    assert facts["H.264 encoder libx264"]["value"].startswith("works")
    assert {name for name in facts if name.startswith("backend ")} == {f"backend {b}" for b in available_backends()}
    assert any(fact["group"] == "attention" and fact["value"] == "works" for fact in facts.values())
    assert all(fact["advice"] or fact["group"] == "attention" for fact in facts.values() if fact["status"] != "ok")


def test_the_page_says_the_same(echo_rt):
    page = echo_rt("doctor").out
    for fact in echo_rt("doctor", "--json").json["facts"]:
        assert fact["name"] in page
    assert page.endswith("generate can run\n")


@pytest.mark.parametrize(("module", "name", "code"), [("av", "av", 1), ("nvtx", "nvtx", 0), ("rich", "rich", 1)])
def test_a_missing_package(echo_rt, monkeypatch, module, name, code):
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    outcome = echo_rt("doctor", "--json")
    assert outcome.code == code
    fact = facts_of(outcome)[name]
    assert fact["status"] == ("missing" if code else "absent")
    assert f"pip install {name}" in fact["advice"]
    page = echo_rt("doctor")
    assert page.code == code, "the page needs none of the packages"
    assert page.out.splitlines()[-1] == (f"generate cannot run: {name}" if code else "generate can run")


def test_a_broken_package_says_why(echo_rt, monkeypatch):
    real = importlib.import_module

    def broken(name: str):
        if name == "transformers":
            raise OSError("libsomething.so: cannot open shared object file\nmore")
        return real(name)

    monkeypatch.setattr(doctor_checks.importlib, "import_module", broken)
    outcome = echo_rt("doctor", "--json")
    assert outcome.code == 1
    assert facts_of(outcome)["transformers"]["value"].endswith("libsomething.so: cannot open shared object file")


def test_without_a_compiler(echo_rt, monkeypatch):
    monkeypatch.setattr(doctor_checks.shutil, "which", lambda *_, **__: None)
    outcome = echo_rt("doctor", "--json")
    assert outcome.code == 0
    for name in ("nvcc", "C++ compiler"):
        assert facts_of(outcome)[name]["value"] == "not found" and "needed only" in facts_of(outcome)[name]["advice"]


def test_without_the_compiled_part(echo_rt, monkeypatch):
    from echo_rt.errors import BackendError

    def absent():
        raise BackendError("no echo_rt._C")

    monkeypatch.setattr(doctor_checks, "build_info", absent)
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
    (fact,) = (fact for fact in doctor_checks._torch() if fact.name == "cuDNN")
    assert (fact.value, fact.status) == (value, status)
    assert bool(fact.advice) == (status != "ok")
    assert number is None or status == "ok" or "faulty 16-bit 3-D convolutions" in fact.advice


def test_an_encoder_that_is_not_there(echo_rt, monkeypatch):
    import av

    def create(name: str, mode: str):
        raise ValueError(f"{name}: no such encoder")

    monkeypatch.setattr(av, "CodecContext", SimpleNamespace(create=create))
    outcome = echo_rt("doctor", "--json")
    assert outcome.code == 1
    assert "PyAV" in facts_of(outcome)["H.264 encoder libx264"]["advice"]
