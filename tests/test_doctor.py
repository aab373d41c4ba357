"""The output of `coconut-fast doctor`: for this machine, for an absent device, and without the C++ module."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.cuda._utils import _get_device_index

from coconut_fast import doctor, ops
from coconut_fast.cli import main


def test_chosen_implementations_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "ragged_attention" in shown and "torch " in shown and "ops on cpu\n" in shown
    assert main(["doctor", "--device", "cuda:77"]) == 0
    shown = capsys.readouterr().out
    assert "\nops on cuda:77 (not here: what would be chosen)\n  ragged_attention" in shown
    assert "\ngeneration on cuda:77 (not here: what would be chosen)\n" in shown
    for backend, native in (("cpu", True), ("torch", False)):
        with ops.use(backend):
            main(["doctor", "--device", "cpu"])
        assert ("native chain" in capsys.readouterr().out) == native, backend


def test_doctor_without_the_cpp_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ImportError("not built")

    monkeypatch.setattr(ops, "extension", absent)
    (line,) = doctor._runners(torch.device("cpu"))
    assert "nothing: the C++ module, which lays out the cache, does not load" in line


def test_doctor_asks_no_gpu_for_a_cpus_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a CUDA build on a GPU machine, whose answers are faked here."""
    monkeypatch.setattr(ops, "extension", lambda: SimpleNamespace(build_info=lambda: {"cuda": True}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", _get_device_index)
    with pytest.raises(ValueError, match="Expected a cuda device"):
        torch.cuda.get_device_name(torch.device("cpu"))
    assert doctor._persistent(torch.device("cpu")) == "off: it runs on cuda, not on cpu"


def test_doctor_asks_for_no_name_of_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that has another one."""
    monkeypatch.setattr(ops, "extension", lambda: SimpleNamespace(build_info=lambda: {"cuda": True}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", {torch.device("cuda", 0): "NVIDIA H200"}.__getitem__)
    for index in (0, 1):
        assert doctor._persistent(torch.device("cuda", index)).startswith("off: no committed measurement")


def test_a_backend_by_name_is_taken_or_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named by the environment, a block or the call, each overruling the one before; none is silently ignored."""
    cpu = torch.device("cpu")
    monkeypatch.setenv("COCONUT_FAST_BACKEND", "torch")
    assert ops.choose("gelu", cpu) == ("torch", "asked for")
    with ops.use("cpu"):
        assert ops.choose("gelu", cpu) == ("cpu", "asked for")
        assert ops.choose("gelu", cpu, "torch")[0] == "torch"
        with pytest.raises(
            ValueError, match=r"cross_entropy: backend 'cpu' was asked for, but .* \(it has triton, torch"
        ):
            ops.choose("cross_entropy", cpu)
    monkeypatch.setenv("COCONUT_FAST_BACKEND", "warp")
    with pytest.raises(ValueError, match="ops.gelu: backend 'warp' was asked for, but gelu has no warp implementation"):
        ops.gelu(torch.zeros(3))
