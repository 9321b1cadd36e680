"""What each target is by its datasheet, and which formats each of its back ends serves."""

import pytest

from trimtab.base import environment
from trimtab.base.errors import InputError
from trimtab.model import hardware
from trimtab.model.hardware import GB, GPUS, TARGETS, machine_memory, target


@pytest.mark.parametrize(
    ("name", "memory_gb", "bandwidth_gb", "capability"),
    [
        ("a100-40", 40, 1555, (8, 0)),
        ("a100-80", 80, 1935, (8, 0)),
        ("l4", 24, 300, (8, 9)),
        ("l40s", 48, 864, (8, 9)),
        ("h100", 80, 3350, (9, 0)),
        ("h200", 141, 4800, (9, 0)),
        ("b200", 180, 8000, (10, 0)),
        ("rtx4090", 24, 1008, (8, 9)),
    ],
)
def test_datasheet(name, memory_gb, bandwidth_gb, capability):
    gpu = target(name)
    assert (gpu.memory_bytes, gpu.bandwidth) == (memory_gb * GB, bandwidth_gb * GB)
    assert gpu.compute_capability == capability


CASTS = {"fp32", "fp16", "bf16"}
INT4 = {"int4_rtn", "int4_awq", "int4_gptq"}
FP8 = {"fp8", "fp8_gptq"}
FP8_PER_CHANNEL = {"fp8_per_channel"}
FP4 = {"nvfp4", "mxfp4"}
FP4_WEIGHTS = {"nvfp4_wo", "mxfp4_wo"}
AMPERE = CASTS | INT4 | {"mixed", "int8_wo", "int8_sq"}
W4A8 = {"w4a8_awq"}


@pytest.mark.parametrize(
    ("name", "backend", "formats", "kv_caches"),
    [
        ("a100-80", "torch", AMPERE, set()),
        ("a100-80", "trtllm", CASTS | INT4, {"fp8"}),
        ("a100-80", "trtllm-legacy", CASTS | INT4 | {"int8_wo", "int8_sq"}, {"int8"}),
        ("a100-80", "vllm", CASTS | INT4 | FP4_WEIGHTS, set()),
        ("l4", "trtllm", CASTS | INT4 | W4A8 | FP8, {"fp8"}),
        ("h100", "torch", AMPERE | FP8 | FP8_PER_CHANNEL, set()),
        ("h100", "trtllm", CASTS | INT4 | W4A8 | FP8 | FP8_PER_CHANNEL | {"nvfp4_wo", "mixed_gpu"}, {"fp8"}),
        ("h100", "trtllm-legacy", CASTS | INT4 | W4A8 | FP8 | {"int8_wo", "int8_sq"}, {"fp8", "int8"}),
        ("h100", "vllm", CASTS | INT4 | FP4_WEIGHTS | FP8 | {"mixed_gpu"}, {"fp8"}),
        ("b200", "trtllm", CASTS | INT4 | W4A8 | FP4 | FP8 | {"nvfp4_wo", "mixed_gpu", "mixed_fp4"}, {"fp8", "nvfp4"}),
        ("b200", "trtllm-legacy", CASTS | FP8, {"fp8"}),
        ("b200", "torch", AMPERE | FP8 | FP8_PER_CHANNEL, set()),
        ("cpu", "torch", AMPERE, set()),
    ],
)
def test_formats(name, backend, formats, kv_caches):
    machine = target(name, memory_bytes=16 * GB)
    assert set(machine.formats[backend]) == formats
    assert set(machine.kv_caches[backend]) == {"none"} | kv_caches


@pytest.mark.parametrize("capability", [(12, 0), (12, 1)])
def test_consumer_blackwell_has_no_nvfp4_kv_cache(capability):
    served = hardware.gpu("consumer", 32, 1792, capability).kv_caches
    assert served == {"torch": ("none",), "trtllm": ("none", "fp8"), "trtllm-legacy": ("none", "fp8"),
                      "vllm": ("none", "fp8")}  # fmt: skip


def test_no_target_below_compute_capability_8_9_has_fp8_anywhere():
    for gpu in GPUS.values():
        has = any("fp8" in formats for formats in gpu.formats.values())
        assert has is (gpu.compute_capability >= (8, 9)), gpu.name


def test_cpu_has_one_back_end_and_measured_memory(tmp_path):
    cpu = target("cpu")
    assert cpu.backends == ("torch",) and cpu.default_backend == "torch"
    assert 0 < cpu.memory_bytes <= machine_memory(tmp_path / "absent")
    assert target("cpu", memory_bytes=5).memory_bytes == 5


@pytest.mark.parametrize(
    ("name", "here", "devices"),
    [
        ("h100", {"gpu": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0"}, 3),
        ("a100-80", {"gpu": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0"}, None),  # planned for elsewhere
        ("h100", {"processor": "a processor", "threads": 2}, None),
        ("cpu", {"gpu": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0"}, None),
    ],
)
def test_a_target_has_as_many_devices_as_this_machine(name, here, devices, monkeypatch):
    monkeypatch.setattr(environment, "device", lambda: here)
    monkeypatch.setattr(environment, "gpus", lambda: 3)
    assert hardware.on_this_machine(target(name)).devices == devices


@pytest.mark.parametrize(("text", "limit"), [("4096\n", 4096), ("max\n", None)])
def test_a_container_has_the_memory_of_its_limit(tmp_path, text, limit):
    (tmp_path / "memory.max").write_text(text)
    assert machine_memory(tmp_path / "memory.max") == (limit or machine_memory(tmp_path / "absent"))


@pytest.mark.parametrize(("name", "near"), [("h10", "h100"), ("rtx-4090", "rtx4090")])
def test_an_unknown_target_names_the_nearest(name, near):
    with pytest.raises(InputError, match=f"target: '{name}' is not known; write '{near}'"):
        target(name)


def test_a_target_without_its_variant_names_the_variants():
    with pytest.raises(InputError, match="target: 'a100' is not known; write 'a100-40' or 'a100-80'$"):
        target("a100")


def test_an_unlike_target_lists_all():
    with pytest.raises(InputError, match=", ".join(TARGETS)):
        target("zzz")
