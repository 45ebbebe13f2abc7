"""CUDA kernels with no headers: what NVRTC makes of every variant, and the conversions that are
not a device's own instruction, compiled as C++."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

from draftloom.kernels.cuda_program import BFLOAT16_BITS, program
from draftloom.kernels.nvrtc import KernelCompileError, Nvrtc, find_nvrtc, load_nvrtc
from tests.support.cuda_variants import FAMILIES

ELF = b"\x7fELF"


@pytest.fixture(scope="module")
def nvrtc() -> Nvrtc:
    found = find_nvrtc()
    if isinstance(found, str):
        pytest.skip(f"there is no NVRTC: {found}")
    return found


@pytest.mark.parametrize("architecture", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_compiles(nvrtc: Nvrtc, family: str, architecture: str) -> None:
    programs = FAMILIES[family]()
    assert len(programs) > 3
    for one in programs[:: 1 if architecture == "sm_90" else 3]:
        cubin = nvrtc.compile(one.name, one.text, [f"--gpu-architecture={architecture}"])
        assert cubin.startswith(ELF)
        assert one.name.encode() in cubin


@pytest.mark.parametrize("architecture", ["sm_75", "sm_120"])
def test_the_conversions_compile_for_older_and_newer_devices(
    nvrtc: Nvrtc, architecture: str
) -> None:
    import mlx.core as mx

    body = "y[0] = static_cast<QT>(static_cast<float>(x[0]));"
    for dtype in (mx.float16, mx.bfloat16):
        text = program("copy", "", body, [("x", dtype, 1)], [("y", dtype)], [("QT", dtype)])
        assert nvrtc.compile("copy", text, [f"--gpu-architecture={architecture}"]).startswith(ELF)


def test_what_the_compiler_refuses_is_said_with_its_log(nvrtc: Nvrtc) -> None:
    options = ["--gpu-architecture=sm_90"]
    with pytest.raises(KernelCompileError) as error:
        nvrtc.compile("broken", 'extern "C" __global__ void broken() { nothing; }', options)
    assert "compile kernel broken (--gpu-architecture=sm_90): NVRTC_ERROR" in str(error.value)
    assert 'broken.cu(1): error: identifier "nothing" is undefined' in str(error.value)
    with pytest.raises(KernelCompileError, match="sm_1"):
        nvrtc.compile("fine", 'extern "C" __global__ void fine() {}', ["--gpu-architecture=sm_1"])


def test_halves_are_only_stored(nvrtc: Nvrtc) -> None:
    """Arithmetic on them would round otherwise than CUDA's own types, so there is none."""
    import mlx.core as mx

    text = program(
        "sum", "", "y[0] = x[0] + x[1];", [("x", mx.bfloat16, 1)], [("y", mx.bfloat16)], []
    )
    with pytest.raises(KernelCompileError, match="no operator"):
        nvrtc.compile("sum", text, ["--gpu-architecture=sm_90"])


def test_a_library_that_is_not_there_is_a_reason() -> None:
    reason = load_nvrtc(["libnvrtc.so.0", "libnvrtc.so.00"])
    assert isinstance(reason, str)
    assert reason.count("libnvrtc.so.0") == 2


@pytest.fixture(scope="module")
def conversions(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("conversions")
    code, library = folder / "halves.cpp", folder / "halves.so"
    code.write_text(
        "#define __device__\n#define __forceinline__ inline\n"
        + BFLOAT16_BITS
        + 'extern "C" void narrow(const unsigned int* from, unsigned short* to, long n) {\n'
        "  for (long i = 0; i < n; ++i) to[i] = bfloat16_bits(from[i]);\n}\n"
        'extern "C" void widen(const unsigned short* from, unsigned int* to, long n) {\n'
        "  for (long i = 0; i < n; ++i) to[i] = bfloat16_as_float_bits(from[i]);\n}\n"
    )
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", str(code), "-o", str(library)]
    subprocess.run(command, check=True, timeout=60)
    return ctypes.CDLL(str(library))


def convert(function: ctypes._NamedFuncPointer, raw: np.ndarray, to: type) -> np.ndarray:
    found = np.empty(raw.shape, to)
    pointers = (ctypes.c_void_p(a.ctypes.data) for a in (raw, found))
    function(*pointers, ctypes.c_long(raw.size))
    return found


def bfloat16_of(floats: np.ndarray) -> np.ndarray:
    """The bits that MLX gives, NaN as the hardware has it."""
    import mlx.core as mx

    with mx.stream(mx.cpu):
        bits = np.array(mx.array(floats).astype(mx.bfloat16).view(mx.uint16))
    return np.where(np.isnan(floats), 0x7FFF, bits).astype(np.uint16)


def test_every_bfloat16_goes_to_float_and_back(conversions: ctypes.CDLL) -> None:
    every = np.arange(65536, dtype=np.uint16)
    wide = convert(conversions.widen, every, np.uint32)
    assert np.array_equal(wide, every.astype(np.uint32) << 16)
    back = convert(conversions.narrow, wide, np.uint16)
    assert np.array_equal(back, np.where(np.isnan(wide.view(np.float32)), 0x7FFF, every))


def test_floats_are_rounded_to_the_nearest_even(conversions: ctypes.CDLL) -> None:
    """Random bits, and every bfloat16 with what decides: just below, on and above a half."""
    words = np.random.default_rng(3).integers(0, 2**32, 1 << 20, dtype=np.uint32)
    every = np.arange(65536, dtype=np.uint32) << 16
    near = [every + part for part in (0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    raw = np.concatenate([words, *near]).astype(np.uint32)
    found = convert(conversions.narrow, raw, np.uint16)
    assert np.array_equal(found, bfloat16_of(raw.view(np.float32)))
