"""Helpers that every part shares: errors in one line, names of attributes, files in one step."""

from pathlib import Path

import pytest

from fedexec._system import files
from fedexec._system.error_text import message_of, one_line
from fedexec._system.find_by_name import find_attribute, split_name


def test_an_error_is_one_line_with_its_class_where_it_has_a_message():
    assert one_line(ValueError("no\n  such\tfile")) == "ValueError: no such file"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert message_of(OSError("two\nlines")) == "two lines"


def test_an_attribute_is_found_by_its_name_also_within_a_class():
    assert find_attribute(*split_name("pathlib:Path.home")) == Path.home
    with pytest.raises(AttributeError, match="no_such"):
        find_attribute("pathlib", "no_such")


@pytest.mark.parametrize("name", ["pathlib", "pathlib:", ":Path", ""])
def test_a_name_without_module_and_attribute_is_refused(name):
    with pytest.raises(ValueError, match=r"is not written like package.module:attribute"):
        split_name(name)


def test_a_new_version_takes_its_place_only_when_it_is_whole(tmp_path):
    path, part = tmp_path / "file", tmp_path / ".part"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.new_version(path, part) as file:
        file.write(b"half")
        assert part.exists() and path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with files.new_version(path, part) as file:
        file.write(b"whole")
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]
