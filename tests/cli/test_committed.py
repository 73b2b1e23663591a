"""The committed results are, byte for byte, what their manifests say."""

import random
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from allo_lib.cli import verify
from allo_lib.cli.driver import Run
from allo_lib.profiles.profile_files import load_profile
from allo_lib.study import manifest

FOLDERS = sorted(path.parent for path in (ROOT / "results").glob(f"*/{manifest.NAME}"))
NAMES = [folder.name for folder in FOLDERS]
CHANGED = 4  # files of each folder that lose a bit, one at a time


def run_of(folder: Path, name: str) -> Run:
    return verify.as_recorded(Run(given=name, profile=load_profile(name), results=folder))


def copied(name: str, target: Path) -> Path:
    ignored = shutil.ignore_patterns(manifest.STORE)
    return shutil.copytree(ROOT / "results" / name, target / name, ignore=ignored)


def flip_a_bit(path: Path, rng: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def test_the_profiles_of_this_project_are_there():
    assert {"smollm2", "tiny"} <= set(NAMES)


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_every_file_has_its_hash_and_the_profile_is_still_the_same(folder):
    assert verify.check_files(run_of(folder, folder.name)) == []


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_one_changed_bit_of_one_file_is_found(folder, tmp_path):
    copy = copied(folder.name, tmp_path)
    run, rng = run_of(copy, folder.name), random.Random(0)
    for name in rng.sample(manifest.file_names(copy), CHANGED):
        flip_a_bit(copy / name, rng)
        assert verify.check_files(run) == [f"{name}: differs from the manifest"]
        shutil.copy2(folder / name, copy / name)
    assert verify.check_files(run) == []


def test_settings_that_were_changed_by_hand_are_found(tmp_path):
    copy = copied("tiny", tmp_path)
    told = manifest.read(copy)
    told["settings"]["method"]["beta"] += 0.1
    manifest.write_json(copy / manifest.NAME, told)
    (problem,) = verify.check_files(run_of(copy, "tiny"))
    assert problem == "manifest.json: its settings do not have its profile hash"
