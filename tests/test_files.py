"""A file is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import errno

import pytest

from limbeck.errors import UserError
from limbeck.files import write_text, write_whole


def half_then(error):
    def write(file):
        file.write(b"half")
        raise error

    return write


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError(), OSError(errno.ENOSPC, "No space left")])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path, error):
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "old")
    with pytest.raises((KeyboardInterrupt, ZeroDivisionError, UserError)):
        write_whole(path, half_then(error))
    assert path.read_text() == "old"
    assert [found.name for found in path.parent.iterdir()] == ["file.txt"]


def test_a_full_disk_is_said_in_one_sentence_that_names_the_file_and_what_is_kept(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(UserError, match=r"/a \(.*No space left.*what was saved there before is kept"):
        write_whole(tmp_path / "a", half_then(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(UserError, match="nothing was there before"):
        write_whole(tmp_path / "b", half_then(OSError(errno.ENOSPC, "No space left")))


def test_a_defect_of_ours_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_whole(tmp_path / "a", half_then(ZeroDivisionError()))


def test_what_is_written_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
