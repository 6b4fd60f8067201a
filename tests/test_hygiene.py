"""Nothing in the product loads code or objects from a file that a user was given."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("configs", "morphcli", "profile", "quantize", "runtime")
OBJECT_LOADERS = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def unsafe(code: str) -> list[str]:
    """What in `code` would run or unpickle a file's content, each with its line."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
            found += [f"{node.lineno}: {name}" for name in sorted(names & OBJECT_LOADERS)]
        elif isinstance(node, ast.ImportFrom) and (node.module or "") in OBJECT_LOADERS:
            found.append(f"{node.lineno}: {node.module}")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "np.load"):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            if ast.unparse(node.value) != "False":
                found.append(f"{node.value.lineno}: trust_remote_code")
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import numpy, joblib",
        "weights = torch.load(path)",
        "load(path, trust_remote_code=True)",
    ],
)
def test_the_check_notices(code: str) -> None:
    assert len(unsafe(code)) == 1


def test_the_check_passes_what_is_safe() -> None:
    assert unsafe("import json\nload(path, trust_remote_code=False)") == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_unpickled_and_no_remote_code_is_run(folder: str) -> None:
    sources = list((ROOT / folder).rglob("*.py"))
    assert sources
    for source in sources:
        assert unsafe(source.read_text("utf-8")) == [], source


# What tells people the time of day, or asks how old a file is; all else waits and measures by
# clocks that nobody sets.
TELLS_THE_TIME = {
    "engine_client.py", "kernels/native.py", "metrics.py", "parts.py",
    "server/completions.py", "server/serving.py", "server/state.py",
}  # fmt: skip


def test_only_what_people_or_files_tell_the_time_by_looks_at_the_wall_clock() -> None:
    runtime = ROOT / "runtime"
    used = {
        str(source.relative_to(runtime))
        for source in runtime.rglob("*.py")
        if "time.time(" in source.read_text("utf-8")
    }
    assert used == TELLS_THE_TIME
