"""What `make coverage` prints."""

from __future__ import annotations

from tests.coverage import report, stretches


def test_adjacent_lines_are_one_stretch() -> None:
    assert stretches([7, 1, 3, 2]) == "1-3 7"
    assert stretches([]) == ""


def test_files_with_most_lines_that_no_test_runs_come_first_and_what_is_not_run_by_tests_does_not_count() -> None:
    text = ["cdef int f() nogil:", "    one()", "    two()", "    three()"]
    counts = {"a.pyx": {1: 0, 2: 1, 3: 0, 9: 0}, "b.pyx": {2: 0, 3: 0, 4: 0}}
    table = report(counts, {"a.pyx": text, "b.pyx": text})
    assert [row.split() for row in table[1:]] == [
        ["3", "0%", "b.pyx", "2-4"],
        ["2", "50%", "a.pyx", "3"],
        ["5", "20.0%", "all"],
    ]
