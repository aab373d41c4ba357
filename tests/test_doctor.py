"""What `coconut-fast doctor` says: here, of a device that is not here, and without the C++ module."""

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


def test_doctor_without_the_cpp_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ImportError("not built")

    monkeypatch.setattr(ops, "extension", absent)
    (line,) = doctor._runners(torch.device("cpu"))
    assert "nothing: the C++ module, which lays out the cache, does not load" in line


def test_doctor_asks_no_gpu_for_a_cpus_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a CUDA build on a GPU machine, of which this has only the answers."""
    monkeypatch.setattr(ops, "extension", lambda: SimpleNamespace(build_info=lambda: {"cuda": True}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", _get_device_index)
    with pytest.raises(ValueError, match="Expected a cuda device"):
        torch.cuda.get_device_name(torch.device("cpu"))
    assert doctor._persistent(torch.device("cpu")) == "off: it runs on cuda, not on cpu"
