"""Coverage-guided fuzzing of one reader by atheris: `python fuzz_readers.py READER CORPUS RUNS`.

atheris takes the process over and ends it, so that tests/test_fuzz.py runs this one beside itself.
The bytes of the corpus are changed where a change reaches new branches of the code. A reader may
take a file, or refuse it by AlloError in one line; all else ends the run with a traceback.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["allo_lib"]):
    from allo_lib import (
        claims,
        importance,
        manifest,
        measurements,
        profile_files,
        published,
        realdata,
        reference,
        report,
        weights,
    )
from allo_lib.errors import AlloError


def _profile(path: Path):
    return profile_files.load_profile(str(path.rename(path.with_suffix(".yaml"))), device="cpu")


def _rows(path: Path):
    folder = path.parent / "ecqa"
    folder.mkdir(exist_ok=True)
    path.rename(folder / "train.jsonl")
    return realdata.load_rows("ecqa", "train", path.parent)


def _manifest(path: Path):
    path.rename(path.with_name(manifest.NAME))
    return manifest.read(path.parent)


def _published(path: Path):
    path.rename(path.with_name("empirical_study.csv"))
    return published.empirical_study(path.parent)


# Reads one file, whose bytes are the input.
READERS = {
    "mask": importance.NeuronMask.load,
    "tensors": weights.read_tensors,
    "reference": lambda path: reference.attach([{"chosen": [1], "rejected": [2]}], path),
    "measurements": measurements.read,
    "claims": claims.read,
    "efficiency": report.read_efficiency,
    "manifest": _manifest,
    "published": _published,
    "profile": _profile,
    "rows": _rows,
}


def main() -> None:
    reader, corpus, runs = sys.argv[1:]

    def once(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            path = Path(folder) / "given"
            path.write_bytes(data)
            try:
                READERS[reader](path)
            except AlloError as error:
                if "\n" in str(error) or not str(error):
                    raise AssertionError(f"not one line: {error!r}") from error

    flags = ["-seed=1", f"-runs={runs}", "-max_len=4096", "-timeout=60", "-rss_limit_mb=8192"]
    atheris.Setup([sys.argv[0], *flags, f"-artifact_prefix={corpus}/../", corpus], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
