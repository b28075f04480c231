"""How a CPU is named in results and receipts: whatever may change a picture's bits changes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from imaged.engine import cpu

ZEN: dict[str, bool | int | str] = {
    "cpu_name": "AMD EPYC",
    "avx512_f": True,
    "avx512_bf16": True,
    "l1d_cache_size": 32768,
    "l2_cache_size": 1048576,
    "num_logical_cores": 2,
}


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Any:
    def name(environ: dict[str, str] | None = None, **other: bool | int | str) -> str:
        monkeypatch.setattr(cpu, "_capabilities", lambda: {**ZEN, **other})
        return cpu.cpu_name(environ or {})

    return name


@pytest.mark.parametrize(
    "other",
    [
        {"cpu_name": "Intel Xeon"},
        {"avx512_bf16": False},
        {"avx512_fp16": True},
        {"l1d_cache_size": 49152},
        {"l2_cache_size": 2097152},
    ],
    ids=str,
)
def test_another_processor_has_another_name(named: Any, other: dict[str, Any]) -> None:
    assert named() != named(**other)


@pytest.mark.parametrize("name", cpu.KERNEL_VARIABLES)
def test_so_has_one_whose_libraries_take_other_kernels(named: Any, name: str) -> None:
    assert named() != named({name: "AVX2"})


def test_what_changes_nothing_is_not_named(named: Any) -> None:
    assert named() == named({"PATH": "/bin"}, num_logical_cores=64)


def test_it_says_what_a_person_asks_first(named: Any) -> None:
    kernels, processor, threads = named().split(", ")
    assert kernels == f"CPU {torch.backends.cpu.get_cpu_capability()}"
    assert processor.startswith("AMD EPYC ")
    assert threads == f"{torch.get_num_threads()} threads"


def test_a_processor_without_a_name_has_that_of_its_kind(named: Any) -> None:
    assert ", " in named(cpu_name="") and named(cpu_name="") != named()


def test_this_machine_is_always_the_same() -> None:
    assert cpu.cpu_name() == cpu.cpu_name()
