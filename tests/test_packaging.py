"""What is installed: every folder and data file, nothing under bare names, imports that hold."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("configs", "morphcli", "profile", "quantize", "runtime")
MAY_IMPORT = {
    "configs": {"configs"},
    "quantize": {"configs", "quantize"},
    "profile": {"configs", "quantize", "profile"},
    "runtime": {"configs", "quantize", "runtime"},
    "morphcli": set(FOLDERS),
}
CONTROL_PLANE = (
    "runtime.blocks",
    "runtime.controller",
    "runtime.in_flight",
    "runtime.memory",
    "runtime.messages",
    "runtime.monitor",
    "runtime.request",
    "runtime.scheduler",
)
OPTIONAL = {"triton"}  # torch for CUDA brings it; `open_device` tells where it is not
HTTP_PROCESS = ("runtime.engine_client", "runtime.metrics", "runtime.server.lifetime")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def run_python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def name_of(source: Path) -> str:
    """`runtime.engine` of runtime/engine.py."""
    parts = source.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or within a function."""
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source} imports relatively"
            yield node.module or ""


def test_every_folder_with_code_is_a_listed_package() -> None:
    found = {".".join(("morphserve", *path.relative_to(ROOT).parent.parts)) for path in SOURCES}
    assert set(SETUPTOOLS["packages"]) == found


def test_every_data_file_is_shipped() -> None:
    patterns = SETUPTOOLS["package-data"]["*"]
    packages = [ROOT.joinpath(*name.split(".")[1:]) for name in SETUPTOOLS["packages"]]
    shipped = {path for package in packages for glob in patterns for path in package.glob(glob)}
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())
    data = {path for path in files if path.suffix not in {".py", ".pyc", ".so"}}
    assert data - shipped == set()
    assert ROOT / "morphcli" / "demo_model" / "model.safetensors" in shipped


def test_every_package_is_typed() -> None:
    for name in SETUPTOOLS["packages"]:
        assert ROOT.joinpath(*name.split(".")[1:], "py.typed").is_file(), name


def test_standard_library_profile_wins_at_the_repository_root() -> None:
    run_python("import cProfile, profile; assert profile.run; cProfile.Profile()")


def test_profile_folder_stays_a_namespace() -> None:
    assert not (ROOT / "profile" / "__init__.py").exists()


def test_type_checkers_find_the_packages_through_the_link() -> None:
    assert (ROOT / ".src" / "morphserve").resolve() == ROOT.resolve()


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_one_way(folder: str) -> None:
    for source in (path for path in SOURCES if path.is_relative_to(ROOT / folder)):
        for module in imported_modules(source):
            if module.startswith("morphserve."):
                assert module.split(".")[1] in MAY_IMPORT[folder], f"{source} imports {module}"


def test_control_plane_needs_no_torch() -> None:
    assert_without_torch(CONTROL_PLANE)


def test_http_process_needs_no_torch() -> None:
    assert_without_torch(HTTP_PROCESS)


def assert_without_torch(names: tuple[str, ...]) -> None:
    imports = ", ".join(f"morphserve.{name}" for name in names)
    run_python(f"import sys, {imports}; assert 'torch' not in sys.modules")


def test_every_module_imports() -> None:
    names = [name_of(path) for path in SOURCES if path.name != "__main__.py"]
    if importlib.util.find_spec("triton") is None:
        names = [name for name in names if "cuda" not in name.split(".")]
    run_python("\n".join(f"import morphserve.{name}" for name in names))


def test_third_party_imports_are_declared_dependencies() -> None:
    declared = {re.match(r"[\w-]+", text)[0] for text in PYPROJECT["project"]["dependencies"]}  # type: ignore[index]
    declared = {normalise(name) for name in declared}
    distributions = packages_distributions()
    for source in SOURCES:
        for top in {module.split(".")[0] for module in imported_modules(source)}:
            if top not in {"morphserve", *OPTIONAL, *sys.stdlib_module_names}:
                provided_by = {normalise(name) for name in distributions.get(top, ())}
                assert provided_by & declared, f"{source} imports {top}"


def normalise(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
