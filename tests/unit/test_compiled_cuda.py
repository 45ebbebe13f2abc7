"""Draftloom's own compiled CUDA kernels: what MLX is handed, and what is kept on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import pytest

from draftloom.kernels import backend
from draftloom.kernels.backend import Backend, kernels_built
from draftloom.kernels.compiled_cuda import CompiledKernel, CudaKernels, kernels_compiled
from draftloom.kernels.cubins import cubin_folder, keep, kept
from draftloom.kernels.cuda_program import program, shaped_inputs
from draftloom.kernels.nvrtc import KernelCompileError, find_nvrtc

SOURCE = "  y[0] = static_cast<T>(x_shape[1] * W + static_cast<int>(flags[0]));"


@attrs.define(eq=False)
class Compiler:
    """Stands in for NVRTC: the text is the machine code."""

    version: str = "1.0"
    seconds: float = 0.0
    asked: list[tuple[str, tuple[str, ...]]] = attrs.field(factory=list)

    def compile(self, name: str, text: str, options: Sequence[str]) -> bytes:
        self.asked.append((name, tuple(options)))
        time.sleep(self.seconds)
        return text.encode()


@attrs.define(eq=False)
class Device:
    """Stands in for MLX's launch of a compiled kernel."""

    launches: list[dict[str, Any]] = attrs.field(factory=list)

    def __call__(self, **arguments: Any) -> list[mx.array]:
        self.launches.append(arguments)
        return [mx.zeros(shape) for shape in arguments["output_shapes"]]


def kernel(
    folder: Path,
    compiler: Any,
    device: Any = None,
    source: str = SOURCE,
    architecture: str = "sm_90",
) -> CompiledKernel:
    names = (("x", "flags"), ("y",))
    made = CompiledKernel("answer", *names, source, "// header", compiler)
    return attrs.evolve(
        made, launch=device or Device(), folder=folder, architecture=lambda: architecture
    )


def launch(one: CompiledKernel, shape: tuple[int, ...] = (2, 3, 5), **other: Any) -> Any:
    arguments: dict[str, Any] = {
        "inputs": [mx.zeros(shape, mx.bfloat16), mx.array([True])],
        "output_shapes": [(7,)],
        "output_dtypes": [mx.float16],
        "template": [("T", mx.float16), ("W", 4), ("ON", True)],
        "grid": (64, 2, 1),
        "threadgroup": (32, 1, 1),
    }
    return one(**{**arguments, **other})


# --- what MLX is handed ------------------------------------------------------------------------


def test_the_text_has_pointers_then_shapes_then_template_values(tmp_path: Path) -> None:
    device = Device()
    (y,) = launch(kernel(tmp_path, Compiler(), device))
    assert y.shape == (7,)
    (given,) = device.launches
    text = given["compiled_source"].decode()
    signature = text[text.index('extern "C"') : text.index("  y[0]")]
    assert (
        signature.split()
        == (
            f'extern "C" __global__ void {given["name"]}( const BFloat16* x, const bool* flags, '
            "Float16* y, const __grid_constant__ int x_shape_0, "
            "const __grid_constant__ int x_shape_1, const __grid_constant__ int x_shape_2) { "
            "using T = Float16; constexpr int W = 4; constexpr bool ON = true;"
        ).split()
    )
    assert text.endswith(SOURCE.replace("x_shape[1]", "x_shape_1") + "\n}\n")
    assert text.index("// header") < text.index('extern "C"')
    assert "#include" not in text


def test_a_launch_hands_on_shapes_as_scalars_and_all_else_as_it_is(tmp_path: Path) -> None:
    device = Device()
    one = kernel(tmp_path, Compiler(), device)
    launch(one)
    launch(one, shape=(4, 1, 9), init_value=float("inf"))
    first, second = device.launches
    assert first["scalars"] == [2, 3, 5]
    assert second["scalars"] == [4, 1, 9]
    assert first["name"] == second["name"]
    assert [x.shape for x in second["inputs"]] == [(4, 1, 9), (1,)]
    assert (first["output_shapes"], first["output_dtypes"]) == ([(7,)], [mx.float16])
    assert (first["grid"], first["threadgroup"]) == ((64, 2, 1), (32, 1, 1))
    assert (first["init_value"], second["init_value"]) == (None, float("inf"))
    assert first["ensure_row_contiguous"] is True


def test_a_body_that_asks_no_shape_gets_none(tmp_path: Path) -> None:
    device = Device()
    launch(kernel(tmp_path, Compiler(), device, source="y[0] = tax_shape(x[0]);"))
    assert device.launches[0]["scalars"] == []
    assert shaped_inputs(["k", "tape_k", "x"], "tape_k_shape[0] + x_shape[1]") == (1, 2)
    assert "q_shape" not in program("f", "", "q_shape;", [("q", mx.int32, 0)], [], []).split("{")[0]


def test_every_set_of_template_values_dtypes_and_axes_is_compiled_once(tmp_path: Path) -> None:
    compiler, device = Compiler(), Device()
    one = kernel(tmp_path, compiler, device)
    for _ in range(2):
        launch(one)
        launch(one, template=[("T", mx.float32), ("W", 4)], output_dtypes=[mx.float32])
        launch(one, inputs=[mx.zeros((2, 3)), mx.array([True])])
        launch(one, shape=(2, 3, 5, 7))
    names = [given["name"] for given in device.launches]
    assert names[:4] == names[4:]
    assert len(set(names)) == 4
    assert [name for name, _ in compiler.asked] == names[:4]


def test_what_does_not_fit_the_names_is_refused(tmp_path: Path) -> None:
    one = kernel(tmp_path, Compiler())
    with pytest.raises(ValueError, match="shorter"):
        launch(one, inputs=[mx.zeros((2, 3))])
    with pytest.raises(ValueError, match="longer"):
        launch(one, output_dtypes=[mx.float16, mx.float16])
    with pytest.raises(ValueError, match="complex64"):
        launch(one, inputs=[mx.zeros((2, 3), mx.complex64), mx.array([True])])


def test_two_threads_compile_once(tmp_path: Path) -> None:
    compiler, device = Compiler(seconds=0.2), Device()
    one = kernel(tmp_path, compiler, device)
    threads = [threading.Thread(target=launch, args=(one,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(device.launches) == 4
    assert len(compiler.asked) == 1


def test_a_failed_compile_is_raised_every_time_and_leaves_nothing(tmp_path: Path) -> None:
    class Refusing(Compiler):
        def compile(self, name: str, text: str, options: Sequence[str]) -> bytes:
            raise KernelCompileError(f"{name}: line 1")

    one = kernel(tmp_path, Refusing())
    for _ in range(2):
        with pytest.raises(KernelCompileError, match=r"answer_\w+: line 1"):
            launch(one)
    assert not list(tmp_path.iterdir())


# --- what is kept ------------------------------------------------------------------------------


def test_what_another_process_compiled_is_not_compiled_again(tmp_path: Path) -> None:
    first, second, device = Compiler(), Compiler(), Device()
    before = kernels_compiled(), kernels_built()
    launch(kernel(tmp_path, first, device))
    assert (kernels_compiled(), kernels_built()) == (before[0] + 1, before[1] + 1)
    launch(kernel(tmp_path, second, device))
    assert (kernels_compiled(), kernels_built()) == (before[0] + 1, before[1] + 1)
    assert (len(first.asked), second.asked) == (1, [])
    one, two = device.launches
    assert (one["name"], one["compiled_source"]) == (two["name"], two["compiled_source"])
    assert [file.name for file in tmp_path.iterdir()] == [one["name"] + ".cubin"]


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_file_is_replaced(
    tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    launch(kernel(tmp_path, Compiler()))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"?" if damage is None else damage)
    compiler = Compiler()
    launch(kernel(tmp_path, compiler))
    assert len(compiler.asked) == 1
    assert file.read_bytes() == whole
    assert "is damaged" in caplog.text


def test_source_architecture_and_version_are_part_of_the_name(tmp_path: Path) -> None:
    device = Device()
    for one in (
        kernel(tmp_path, Compiler(), device),
        kernel(tmp_path, Compiler(), device, source=SOURCE + " "),
        kernel(tmp_path, Compiler(), device, architecture="sm_80"),
        kernel(tmp_path, Compiler(version="1.1"), device),
        attrs.evolve(kernel(tmp_path, Compiler(), device), header="// other"),
    ):
        launch(one)
    assert len({given["name"] for given in device.launches}) == 5
    assert len(list(tmp_path.iterdir())) == 5


def test_the_architecture_goes_to_the_compiler(tmp_path: Path) -> None:
    compiler = Compiler()
    launch(kernel(tmp_path, compiler, architecture="sm_80"))
    assert compiler.asked[0][1] == ("--gpu-architecture=sm_80",)


def test_a_folder_that_cannot_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    folder, compiler = tmp_path / "file" / "cuda", Compiler()
    with caplog.at_level(logging.WARNING, "draftloom.kernels"):
        for architecture in ("sm_80", "sm_90"):
            launch(kernel(folder, compiler, architecture=architecture))
    assert len(compiler.asked) == 2
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if "cannot be written" in text]) == 1


def test_processes_may_write_the_same_file(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from draftloom.kernels.cubins import keep, kept\n"
        "data = bytes(range(256)) * 400\n"
        "for _ in range(100):\n"
        "    keep(Path(sys.argv[1]), 'one', data)\n"
        "    assert kept(Path(sys.argv[1]), 'one') == data\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command) for _ in range(3)]
    assert [one.wait(timeout=60) for one in running] == [0, 0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["one.cubin"]


def test_a_file_is_a_digest_and_the_cubin(tmp_path: Path) -> None:
    assert kept(tmp_path, "none") is None
    keep(tmp_path / "below", "one", b"cubin")
    assert kept(tmp_path / "below", "one") == b"cubin"
    content = (tmp_path / "below" / "one.cubin").read_bytes()
    assert content == hashlib.sha256(b"cubin").digest() + b"cubin"


def test_kernels_are_kept_in_the_cache_folder() -> None:
    assert cubin_folder() == Path(os.environ["XDG_CACHE_HOME"], "draftloom", "cuda")


# --- who compiles ------------------------------------------------------------------------------


@attrs.frozen
class Body:
    """A kernel that asks for little."""

    name: str = "draftloom_test_body"
    inputs: tuple[str, ...] = ("x",)
    outputs: tuple[str, ...] = ("y",)
    source: str = "y[0] = x[0];"


def test_what_reads_strides_and_all_else_without_a_compiler_is_made_by_mlx() -> None:
    asked: list[dict[str, Any]] = []

    def mlx(**parts: Any) -> Any:
        asked.append(parts)
        return lambda **_: []

    before = kernels_built()
    with_compiler = Backend("cuda", CudaKernels(Compiler, mlx), "// header")
    without = Backend("cuda", CudaKernels(lambda: "no such file", mlx), "// header")
    own = with_compiler.kernel(Body(), (mx.float32,), ())
    assert isinstance(own, CompiledKernel)
    assert (own.source, own.header, own.input_names) == (Body().source, "// header", ("x",))
    assert (asked, kernels_built()) == ([], before)  # it counts when it is compiled
    with_compiler.kernel(Body(), (mx.float32,), (), strided=True)
    without.kernel(Body(), (mx.float16,), ())
    assert [parts["ensure_row_contiguous"] for parts in asked] == [False, True]
    assert asked[1]["source"] == Body().source
    assert kernels_built() == before + 2


def test_plans_of_one_source_share_what_is_compiled() -> None:
    compiler = Compiler()
    backend = Backend("cuda", CudaKernels(lambda: compiler), "")
    one = backend.kernel(Body(), (mx.float32,), ())
    assert backend.kernel(Body(), (mx.float32,), ()) is one
    assert backend.kernel(Body(), (mx.float16,), ()) is not one


def test_how_kernels_are_compiled_is_one_line() -> None:
    found = CudaKernels(lambda: "no such file").how()
    assert found == "by MLX, anew in every process: no such file"
    found = CudaKernels(Compiler).how()
    assert found == f"by NVRTC 1.0, kept in {cubin_folder()}"


def test_a_real_compiler_from_text_to_disk(tmp_path: Path) -> None:
    found = find_nvrtc()
    if isinstance(found, str):
        pytest.skip(f"there is no NVRTC: {found}")
    device = Device()
    one = kernel(tmp_path, found, device, source="y[0] = static_cast<T>(1.0f * x_shape[1] * W);")
    launch(one)
    cubin = device.launches[0]["compiled_source"]
    assert cubin.startswith(b"\x7fELF")
    assert kept(tmp_path, device.launches[0]["name"]) == cubin


@pytest.mark.parametrize(
    ("here", "least", "why"),
    [
        ("sm_75", 80, "the GPU is sm_75, the kernel needs sm_80 or newer"),
        ("sm_80", 80, None),
        ("sm_120", 80, None),
        ("sm_75", 0, None),
    ],
)
def test_a_device_without_the_instructions_is_told_before_anything_is_compiled(
    here: str, least: int, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "architecture", lambda: here)
    assert Backend("cuda", CudaKernels(), "", least=least).why_missing() == why
