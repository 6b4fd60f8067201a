"""A build that is interrupted, at whatever moment, loses no bundle and goes on when asked."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import SystemRandom
from typing import Any

import dying_builds
import pytest

from morphserve.configs.errors import ConfigError, MorphError
from morphserve.quantize import build
from morphserve.quantize.build import QuantizeSettings, build_bundle
from morphserve.quantize.bundle import BadBundle, open_bundle
from morphserve.quantize.calibration import Part, Windows, draw_windows
from morphserve.quantize.checkpoint import Checkpoint, open_checkpoint
from morphserve.quantize.files import DiskFull
from morphserve.quantize.workspace import Interrupted

RTN = QuantizeSettings("rtn", 32)
BOTH = QuantizeSettings("rtn", 32, int8=True)


@pytest.fixture
def checkpoint(tiny_model: Callable[[str], Path]) -> Checkpoint:
    return open_checkpoint(str(tiny_model("llama")))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "model.morph"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_behind(layer: int) -> Callable[[int], None]:
    def on_layer(i: int) -> None:
        if i == layer:
            raise KeyboardInterrupt

    return on_layer


def interrupt(checkpoint: Checkpoint, target: Path, **options: Any) -> str:
    """An unfinished build of two layers, and what the user is told."""
    with pytest.raises(Interrupted) as caught:
        build_bundle(checkpoint, target, RTN, on_layer=stop_behind(1), **options)
    return str(caught.value)


def refusal(
    checkpoint: Checkpoint, target: Path, settings: QuantizeSettings, **options: Any
) -> str:
    with pytest.raises(ConfigError) as caught:
        build_bundle(checkpoint, target, settings, **options)
    return str(caught.value)


def die(model: Path, target: Path, kind: str, seed: int) -> Any:
    command = [sys.executable, dying_builds.__file__, str(model), str(target), kind, str(seed)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, f"seed {seed}: {run.stderr}"
    return json.loads(run.stdout)


@pytest.mark.parametrize("kind", ["at-random", "at-every-step"])
def test_killed_builds_leave_a_bundle_and_end_as_an_undisturbed_one(
    kind: str, checkpoint: Checkpoint, target: Path, tmp_path: Path
) -> None:
    build_bundle(checkpoint, target, QuantizeSettings("rtn", 64))
    before = dying_builds.state(target)
    build_bundle(checkpoint, tmp_path / "reference", BOTH)
    reference = dying_builds.state(tmp_path / "reference")
    found = die(checkpoint.path, target, kind, SystemRandom().randrange(2**32))
    assert len(found["deaths"]) >= dying_builds.KILLS
    assert set(found["deaths"]) <= {before, reference, "between"}
    assert found["end"] == reference
    assert {path.name for path in tmp_path.iterdir()} == {"model.morph", "reference"}


def test_a_first_build_that_is_killed_ends_as_an_undisturbed_one(
    checkpoint: Checkpoint, target: Path, tmp_path: Path
) -> None:
    build_bundle(checkpoint, tmp_path / "reference", BOTH)
    seed = SystemRandom().randrange(2**32)
    found = die(checkpoint.path, target, "at-random", seed)
    assert set(found["deaths"]) <= {"nothing", "between", found["end"]}, seed
    assert content(target) == content(tmp_path / "reference")


def test_an_interrupted_build_tells_how_to_go_on(
    checkpoint: Checkpoint, target: Path, tmp_path: Path
) -> None:
    message = interrupt(checkpoint, target)
    assert "2 of 3 layers are kept: run the same command with --resume" in message
    with pytest.raises(BadBundle, match="unfinished build of it: .* --resume"):
        open_bundle(str(target), checkpoint)
    done: list[int] = []
    build_bundle(checkpoint, target, RTN, resume=True, on_layer=done.append)
    assert done == [1, 2]  # that layers up to 1 were finished is told first
    build_bundle(checkpoint, tmp_path / "reference", RTN)
    assert content(target) == content(tmp_path / "reference")


def test_an_unfinished_build_is_neither_taken_up_nor_given_up_unasked(
    checkpoint: Checkpoint, target: Path
) -> None:
    interrupt(checkpoint, target)
    message = refusal(checkpoint, target, RTN)
    assert "pass --resume to go on with it, or --force to begin anew" in message
    done: list[int] = []
    build_bundle(checkpoint, target, RTN, force=True, on_layer=done.append)
    assert done == [0, 1, 2]


def test_an_unfinished_build_beside_a_bundle_needs_both_words(
    checkpoint: Checkpoint, target: Path
) -> None:
    build_bundle(checkpoint, target, QuantizeSettings("rtn", 64))
    before = content(target)
    interrupt(checkpoint, target, force=True)
    assert content(target) == before
    for resume in (False, True):
        message = refusal(checkpoint, target, RTN, resume=resume)
        assert "pass --force to replace it; to go on" in message and "--force --resume" in message
    build_bundle(checkpoint, target, RTN, force=True, resume=True)
    assert content(target) != before


def test_a_build_of_another_plan_is_not_resumed(
    checkpoint: Checkpoint,
    tiny_model: Callable[[str], Path],
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupt(checkpoint, target)
    settings = refusal(checkpoint, target, QuantizeSettings("rtn", 64), resume=True)
    assert "its int4 layers have group_size 32 instead of 64" in settings
    assert "pass --force without --resume to begin anew" in settings
    assert "it was begun for int4" in refusal(checkpoint, target, BOTH, resume=True)
    other = open_checkpoint(str(tiny_model("mistral")))
    assert "begun with other weights" in refusal(other, target, RTN, resume=True)
    monkeypatch.setattr(build, "version", lambda: "9.9")
    message = refusal(checkpoint, target, RTN, resume=True)
    assert "begun by morphserve 0.1.0 and this is morphserve 9.9" in message


def test_a_damaged_record_of_progress_is_not_resumed(checkpoint: Checkpoint, target: Path) -> None:
    interrupt(checkpoint, target)
    path = target.with_name(".model.morph.partial") / "progress.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert "its progress.json cannot be used" in refusal(checkpoint, target, RTN, resume=True)


def test_damaged_layers_and_leftovers_are_made_anew(
    checkpoint: Checkpoint, target: Path, tmp_path: Path
) -> None:
    interrupt(checkpoint, target)
    partial = target.with_name(".model.morph.partial")
    path = partial / "layer-00001.int4.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (partial / ".layer-00002.int4.safetensors.4711.tmp").write_bytes(b"half a layer")
    done: list[int] = []
    build_bundle(checkpoint, target, RTN, resume=True, on_layer=done.append)
    assert done == [0, 1, 2]  # layer 0 was finished
    build_bundle(checkpoint, tmp_path / "reference", RTN)
    assert content(target) == content(tmp_path / "reference")


def test_resuming_needs_nothing_to_resume(checkpoint: Checkpoint, target: Path) -> None:
    """So that a script can run the same line until it succeeds."""
    done: list[int] = []
    for _ in range(2):
        build_bundle(checkpoint, target, RTN, resume=True, on_layer=done.append)
    assert done == [0, 1, 2, 2]  # the second time nothing is left


def test_one_build_at_a_time(checkpoint: Checkpoint, target: Path, tmp_path: Path) -> None:
    messages = []

    def build_too(_: int) -> None:
        for options in ({}, {"force": True}, {"resume": True}):
            messages.append(refusal(checkpoint, target, RTN, **options))

    build_bundle(checkpoint, target, RTN, on_layer=build_too)
    assert len(messages) == 9
    assert all("another `morph quantize` is writing" in message for message in messages)
    open_bundle(str(target), checkpoint)
    assert list(tmp_path.iterdir()) == [target]


@contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_stops_a_build_which_then_goes_on(
    checkpoint: Checkpoint, target: Path, tmp_path: Path
) -> None:
    def fill(_: int) -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))

    with file_limit(10_000), pytest.raises(DiskFull) as caught:
        build_bundle(checkpoint, target, RTN, on_layer=fill)
    message = str(caught.value)
    assert "layer-00001" in message and "1 of 3 layers are kept, the rest needs about" in message
    assert "make room and run the same command with --resume" in message
    assert not target.exists()
    build_bundle(checkpoint, target, RTN, resume=True)
    build_bundle(checkpoint, tmp_path / "reference", RTN)
    assert content(target) == content(tmp_path / "reference")


def test_a_disk_without_room_is_noticed_before_the_first_layer(
    checkpoint: Checkpoint, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(DiskFull, match=r"has 0.1 MB free and the bundle needs \d+\.\d MB more"):
        build_bundle(checkpoint, target, RTN)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "missing/parents/model.morph", "with space.morph"])
def test_a_target_may_be_new_nested_or_an_empty_folder(
    checkpoint: Checkpoint, tmp_path: Path, name: str
) -> None:
    (tmp_path / "empty").mkdir()
    target = tmp_path / "empty" / name
    build_bundle(checkpoint, target, RTN)
    open_bundle(str(target), checkpoint)


def test_a_link_to_a_folder_stays_a_link(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    build_bundle(checkpoint, tmp_path / "link", RTN)
    assert (tmp_path / "link").is_symlink()
    open_bundle(str(tmp_path / "disk"), checkpoint)


def test_places_that_cannot_be_written_are_errors_of_the_user(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "below", Path("/")):
        with pytest.raises(MorphError):
            build_bundle(checkpoint, target, RTN, force=True)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "name",
    [
        "layer-notes.txt",
        "layer-00000.int4.safetensors.orig",
        "layer-7.int4.safetensors",
        "profile.docx",
        "profile.png",
        "bundle.json.bak",
        "progress.json.d/thesis.txt",
        "profile.json/thesis.txt",
        ".bundle.json.d/thesis.txt",
    ],
)
def test_folders_of_the_user_are_never_replaced(
    checkpoint: Checkpoint, target: Path, name: str
) -> None:
    places = (
        target,
        target.with_name(".model.morph.partial"),
        target.with_name(".model.morph.replaced"),
    )
    for place in places:
        (place / name).parent.mkdir(parents=True)
        (place / name).write_text("mine")
        message = refusal(checkpoint, target, RTN, force=True)
        assert f"{place} holds other files than a bundle's" in message
        assert (place / name).read_text() == "mine"
        shutil.rmtree(place)


def test_what_a_bundle_leaves_may_be_replaced(checkpoint: Checkpoint, target: Path) -> None:
    build_bundle(checkpoint, target, RTN)
    for name in ("profile.json", "profile.svg", "profile.png", "profile.html"):
        (target / name).write_text("a report")
        (target / f".{name}.4711.tmp").write_text("half a report")
    build_bundle(checkpoint, target, RTN, force=True)
    assert not list(target.glob("*profile*"))


def test_a_build_that_is_stopped_before_its_first_layer_says_that_nothing_is_kept(
    checkpoint: Checkpoint, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "FullLayer", stop)
    with pytest.raises(Interrupted, match="nothing is kept: run the same command to begin anew"):
        build_bundle(checkpoint, target, RTN)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("harm", ["change", "remove"])
def test_a_damaged_bundle_is_not_taken_for_the_end_of_a_build(
    checkpoint: Checkpoint, target: Path, harm: str
) -> None:
    build_bundle(checkpoint, target, RTN)
    path = target / "layer-00001.int4.safetensors"
    data = path.read_bytes()
    path.unlink()
    if harm == "change":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    message = refusal(checkpoint, target, RTN, resume=True)
    assert "holds a bundle already: pass --force to replace it" in message


def test_another_calibration_text_is_named_by_what_differs(
    checkpoint: Checkpoint, target: Path, tmp_path: Path
) -> None:
    (tmp_path / "novel.txt").write_text("It was a dark and stormy night; rain fell. " * 200)

    def windows(count: int) -> Windows:
        text = str(tmp_path / "novel.txt")
        return draw_windows(checkpoint, text, Part.CALIBRATION, count, 16, 0)

    interrupt(checkpoint, target, windows=windows(4))
    fewer = refusal(checkpoint, target, RTN, windows=windows(3), resume=True)
    assert "int4 layers have calibration text with sha256 " in fewer
    assert "TextSample" not in fewer
    without = refusal(checkpoint, target, RTN, resume=True)
    assert "have calibration novel.txt" in without and "instead of none" in without
