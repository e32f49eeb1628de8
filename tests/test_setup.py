"""What setup.py decides: which native modules it builds, and in which words it says why one is missing."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def setup_py(monkeypatch: pytest.MonkeyPatch, **env: str) -> dict[str, Any]:
    """What setup.py defines in this environment, without setting anything up."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("SAM_FAST_CUDA", "SAM_FAST_NATIVE", "TORCH_CUDA_ARCH_LIST", "CMAKE_CUDA_ARCHITECTURES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_cuda_that_is_asked_for_but_cannot_be_built_is_an_error(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="SAM_FAST_CUDA=1 asks for the CUDA module, but there is no nvcc"):
        setup_py(monkeypatch, SAM_FAST_CUDA="1", CUDA_HOME=str(tmp_path))
    with pytest.raises(SystemExit, match=r"SAM_FAST_CUDA=.yes. is unknown"):
        setup_py(monkeypatch, SAM_FAST_CUDA="yes")


def test_nvcc_is_found_where_cuda_installs_itself(monkeypatch, tmp_path):
    find_nvcc = setup_py(monkeypatch, PATH=str(tmp_path))["find_nvcc"]
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert find_nvcc.__globals__["INSTALLED"] == "/usr/local/cuda/bin"
    monkeypatch.setitem(find_nvcc.__globals__, "INSTALLED", str(tmp_path / "cuda"))
    assert find_nvcc() is None
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "nvcc").touch(0o755)
    assert find_nvcc() == str(tmp_path / "cuda" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))  # where it is said to be, it must be
    assert find_nvcc() is None


def test_architectures_in_pytorchs_notation(monkeypatch):
    options = setup_py(monkeypatch, TORCH_CUDA_ARCH_LIST="8.0 9.0a;10.0+PTX")["cuda_options"]
    assert "-DCMAKE_CUDA_ARCHITECTURES=80-real;90a-real;100" in options()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "hopper")
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST names .hopper.: use numbers such as 8\.0"):
        options()


def test_an_nvcc_that_does_not_work_is_left_out_with_a_warning(tmp_path, monkeypatch, capsys):
    """setup.py itself, with CMake replaced: it fails where it is to build the CUDA module."""
    setup = setup_py(monkeypatch)
    setuptools = pytest.importorskip("setuptools")
    command = setup["CMakeBuild"](
        setuptools.Distribution({"ext_modules": [setuptools.Extension("sam_fast._cpu", sources=[])]})
    )
    command.extensions = [setuptools.Extension("sam_fast._cpu", sources=[])]
    command.get_ext_fullpath = lambda _: str(tmp_path / "sam_fast" / "_cpu.so")
    calls = []

    def cmake(target: Path, options: list[str]) -> None:
        calls.append(options)
        if options:
            raise subprocess.CalledProcessError(1, "cmake")

    command.cmake = cmake
    monkeypatch.setitem(setup["CMakeBuild"].run.__globals__, "NVCC", "/somewhere/nvcc")
    command.run()
    output = capsys.readouterr().out
    assert output.count("WARNING") == 1
    assert "sam_fast._cpu: built; sam_fast._cuda: not built: with /somewhere/nvcc: " in output
    assert "-DSAM_FAST_CUDA=ON" in calls[0]
    assert calls[1] == []
    monkeypatch.setitem(setup["CMakeBuild"].run.__globals__, "CUDA", "1")
    with pytest.raises(SystemExit, match="SAM_FAST_CUDA=0 leaves the CUDA kernels out"):
        command.run()


CMAKE_SAYS = """\
-- The CXX compiler identification is unknown
CMake Error at CMakeLists.txt:3 (project):
  The C++ compiler

    "/bin/false"

  is not able to compile a simple test program.

  It fails with the following output:
"""


CUDA_COMPILER_SAYS = """\
CMake Error at /usr/share/cmake/Modules/CMakeTestCUDACompiler.cmake:103 (message):
  The CUDA compiler

    "/usr/local/bin/nvcc"

  is not able to compile a simple test program.

  It fails with the following output:

    Building CUDA object CMakeFiles/cmTC_0461b.dir/main.cu.o
    {}
    gmake[1]: *** [CMakeFiles/cmTC_0461b.dir/build.make:79: CMakeFiles/cmTC_0461b.dir/main.cu.o] Error 1
"""
OLD_NVCC = (
    "/usr/include/crt/host_config.h:143:2: error: #error -- unsupported GNU version! gcc versions later than "
    "15 are not supported! The nvcc flag '-allow-unsupported-compiler' can be used to override this version check; "
    "however, using an unsupported host compiler may cause compilation failure. Use at your own risk."
)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            CUDA_COMPILER_SAYS.format("nvcc fatal   : Unsupported gpu architecture 'compute_70'"),
            "Unsupported gpu architecture 'compute_70'",
        ),
        (
            "[2/9] a.cu\nnvcc error   : 'cicc' died due to signal 9 (Kill signal)",
            "'cicc' died due to signal 9 (Kill signal)",
        ),
        (CUDA_COMPILER_SAYS.format(OLD_NVCC), OLD_NVCC.partition("error: ")[2].partition(". ")[0]),
        (CMAKE_SAYS, 'The C++ compiler "/bin/false" is not able to compile a simple test program'),
        ("[1/9] ...\na.cpp:3:1: error: no such type\na.cpp:4:1: error: more", "no such type"),
        (None, "Command 'cmake' returned non-zero exit status 1."),
    ],
    ids=["architecture", "killed", "host compiler", "CMake", "compiler", "silent"],
)
def test_the_reason_for_a_failed_build_is_in_the_words_of_the_one_that_failed(monkeypatch, output, reason):
    assert setup_py(monkeypatch)["reason"](subprocess.CalledProcessError(1, "cmake", output)) == reason


def test_a_package_index_gets_no_link_that_leads_nowhere(monkeypatch, tmp_path):
    setup = setup_py(monkeypatch)
    monkeypatch.setitem(setup["readme"].__globals__, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(
        "![a picture](docs/a.png)\n\nSee [the guide](docs/guide.md), [SAM](https://arxiv.org/abs/2010.01412), [it](#x)."
    )
    assert setup["readme"]() == "See the guide, [SAM](https://arxiv.org/abs/2010.01412), [it](#x)."


def test_an_unknown_choice_of_native_modules_is_an_error(monkeypatch):
    with pytest.raises(SystemExit, match=r"SAM_FAST_NATIVE=.no. is unknown: use 0, 1 or auto"):
        setup_py(monkeypatch, SAM_FAST_NATIVE="no")


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_no_compiler_is_looked_for_on_windows(monkeypatch, tmp_path):
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DCMAKE_HOST_WIN32=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "compiler identification" not in done.stdout
    error = subprocess.CalledProcessError(done.returncode, command, done.stdout + done.stderr)
    assert setup_py(monkeypatch)["reason"](error) == "The native modules are not built on Windows"
