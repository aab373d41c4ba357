"""What the architecture promises about files: who imports whom, what an import loads, what a wheel holds."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "coconut_fast"

# A module may import its own layer and those below it. Modules at the top of the package that are not named here
# (the command line and what belongs to it) are above everything.
LAYERS = [
    ["_C"],
    ["kernels"],
    ["__init__", "files", "tokens"],
    ["ops"],
    ["model"],
    ["infer", "data", "train"],
    ["evaluate", "inspect"],
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def _layer(module: str) -> int:
    """The height of "coconut_fast.<name>...."."""
    return HEIGHT.get([*module.split("."), "__init__"][1], len(LAYERS))


def _sources() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")])


def _name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(("coconut_fast", *parts) if parts[0] == "kernels" else parts).removesuffix(".__init__")


def _imports(file: Path) -> Iterator[str]:
    """Full names of the modules (and names) that a file imports, anywhere in it, by statement or by string."""
    package = _name(file).split(".") if file.stem == "__init__" else _name(file).split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"coconut_fast(\.\w+)+\.?", str(node.value)):
            yield str(node.value)


def _ours(file: Path) -> list[str]:
    return [name for name in _imports(file) if re.match(r"coconut_fast(\.|$)", name)]


@pytest.mark.parametrize("file", _sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_downwards(file: Path):
    importer = _name(file)
    if file == PACKAGE / "__init__.py":
        return  # its public names load on first use
    for imported in _ours(file):
        assert _layer(imported) <= _layer(importer), f"{importer} imports {imported}"


def test_only_ops_loads_implementations():
    for file in set(_sources()) - {PACKAGE / "ops.py", PACKAGE / "kernels.py"}:
        allowed = "coconut_fast.kernels" if file.is_relative_to(ROOT / "kernels") else "nothing"
        for imported in _ours(file):
            reaches = re.match(r"coconut_fast\.(kernels|_C)\b", imported)
            assert not reaches or imported.startswith(allowed), f"{_name(file)} imports {imported}"


def test_kernels_import_nothing_else_of_ours():
    for file in (ROOT / "kernels").glob("*.py"):
        assert all(name.startswith("coconut_fast.kernels") for name in _ours(file)), file
    assert not (ROOT / "kernels" / "__init__.py").exists(), "the import name `kernels` belongs to another package"


def test_data_needs_no_model_and_no_gpu():
    for file in (PACKAGE / "data").glob("*.py"):
        text = file.read_text()
        assert "torch.cuda" not in text and ".cuda(" not in text, file
        allowed = re.compile(r"coconut_fast\.(data|tokens|files)\b")
        assert all(allowed.match(name) for name in _ours(file)), file


def test_everything_imported_is_a_declared_dependency():
    declared = {name.lower() for name in re.findall(r'^    f?"([\w-]+)[>=]', (ROOT / "setup.py").read_text(), re.M)}
    distribution = {"yaml": "pyyaml"}
    for file in _sources():
        for name in {imported.split(".")[0] for imported in _imports(file)} - set(sys.stdlib_module_names):
            if name.isidentifier() and name != "coconut_fast":
                assert distribution.get(name, name) in declared, f"{_name(file)} imports {name}, setup.py has it not"


def test_the_oracle_imports_nothing_of_ours():
    assert _ours(PACKAGE / "reference.py") == []
    assert len((PACKAGE / "reference.py").read_text().splitlines()) < 100


def test_no_file_is_longer_than_400_lines_or_wider_than_120_columns():
    folders = ["coconut_fast", "kernels", "csrc", "tests", "benchmarks"]
    files = [file for folder in folders for file in (ROOT / folder).rglob("*")] + list(ROOT.glob("*.py"))
    for file in files:
        if file.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}:
            lines = file.read_text().splitlines()
            assert len(lines) <= 400, f"{file.relative_to(ROOT)} has {len(lines)} lines"
            wide = [n for n, line in enumerate(lines, 1) if len(line) > 120 and "# type: ignore" not in line]
            assert not wide, f"{file.relative_to(ROOT)}: lines {wide} are wider than 120 columns"


def _python(code: str, folder: Path) -> str:
    """What `code` prints, run by a fresh interpreter that sees `folder` and no other copy of the package."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_heavy():
    code = "import coconut_fast; print(sorted({'torch', 'triton', 'transformers'} & set(sys.modules)))"
    assert _python(code, ROOT) == "[]"


def test_threads_may_read_public_names_at_once():
    code = """if True:
        import coconut_fast, threading
        barrier, wrong = threading.Barrier(7), []
        def read(name):
            barrier.wait()
            try:
                getattr(coconut_fast, name)
            except ImportError as error:
                wrong.append(error)
        threads = [threading.Thread(target=read, args=[name]) for name in coconut_fast.__all__]
        [t.start() for t in threads]
        [t.join() for t in threads]
        print(wrong)"""
    assert _python(code, ROOT) == "[]"


def test_public_names_have_types(tmp_path: Path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(
        "import coconut_fast\n"
        "reveal_type(coconut_fast.load('x'))\n"
        "coconut_fast.generate('x', 'y', num_thought=3)\n"
        "coconut_fast.nonsense\n"
    )
    mypy = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "user.py")]
    said = subprocess.run(mypy, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)})
    assert 'Revealed type is "coconut_fast.model.coconut.Coconut"' in said.stdout, said.stdout + said.stderr
    assert 'Unexpected keyword argument "num_thought"' in said.stdout
    assert 'Module has no attribute "nonsense"' in said.stdout


def test_importing_ops_touches_no_gpu_and_no_triton():
    code = "import coconut_fast.ops, torch; print('triton' in sys.modules, torch.cuda.is_initialized())"
    assert _python(code, ROOT) == "False False"


@pytest.mark.parametrize("place", ["kernels", "coconut_fast/kernels"], ids=["checkout", "installed"])
def test_kernels_import_from_a_checkout_and_installed(tmp_path: Path, place: str):
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(PACKAGE, tmp_path / "coconut_fast", ignore=ignore)
    shutil.copytree(ROOT / "kernels", tmp_path / place, ignore=ignore)
    code = "import coconut_fast.kernels.reference as r; print(r.__file__)"
    assert _python(code, tmp_path) == str(tmp_path / place / "reference.py")


def test_build_info_names_this_torch():
    from coconut_fast import ops

    info = ops.extension().build_info()
    assert torch.__version__.startswith(info["torch"].split("+")[0])
    assert info["cuda"] or info["cuda_reason"]
    assert info["compiler"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the files that git does not ignore, built without isolation."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the package is not known")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", str(out)]
    subprocess.run([*pip, str(source)], check=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        metadata = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    (module,) = [name for name in names if name.startswith("coconut_fast/_C.")]
    expected = {str(file.relative_to(ROOT)) for file in PACKAGE.rglob("*.py")}
    expected |= {f"coconut_fast/{file.relative_to(ROOT)}" for file in (ROOT / "kernels").glob("*.py")}
    expected |= {f"coconut_fast/{file.relative_to(ROOT)}" for file in (ROOT / "recipes").glob("*.yaml")}
    assert set(names) - {module} == expected | {"coconut_fast/py.typed"}
    minor = ".".join(torch.__version__.split(".")[:2])
    assert f"Requires-Dist: torch=={minor}.*" in metadata, "a wheel requires the torch it was built against"
    assert re.search(r"Requires-Dist: triton==3\.[67]\.\*; platform_system", metadata), "and that torch's Triton"
    assert "Requires-Python: <3.14,>=3.11" in metadata


@pytest.mark.slow
def test_the_wheel_works(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import coconut_fast.kernels.reference as r; from coconut_fast import ops; print(r.__file__)\n"
    code += "assert ops.extension().__file__.startswith(sys.path[0]); ops.extension().CacheLayout(4)"
    assert _python(code, tmp_path) == str(tmp_path / "coconut_fast" / "kernels" / "reference.py")
