"""What every refusal of bad input has in common, for the tests of it."""

import contextlib

import pytest

from allo_lib.errors import AlloError

LONGEST = 1500  # characters of a message: those that list the keys of a section are the longest


def assert_one_line(message: str) -> None:
    assert message.strip() and not {"\n", "\r", "\x1b"} & set(message), message
    assert len(message) <= LONGEST, message


@contextlib.contextmanager
def refused(*told: str):
    """The block raises AlloError with one line that contains every one of `told`."""
    with pytest.raises(AlloError) as caught:
        yield
    for part in told:
        assert part in str(caught.value)
    assert_one_line(str(caught.value))


def read_or_refused(read):
    """What `read()` returns, or None where it refuses in one line; anything else is an error."""
    try:
        return read()
    except AlloError as error:
        assert_one_line(str(error))
        return None


def tree(folder) -> dict:
    """Every file under a folder with its bytes, and every folder: to see that nothing changed."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def stamps(folder) -> dict[str, tuple[bytes, int]]:
    """Bytes and modification time of every file: to see that none was even written again."""
    paths = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}
