from ffssl.tables import Table, table


def test_columns_line_up_and_are_as_wide_as_their_widest_cell():
    rows = [("baseline", 15, "98.6%"), ("efficient", 8, "97.5%")]
    assert table(("run", "epochs", "kNN"), rows) == (
        "| run       | epochs |   kNN |\n"
        "|-----------|-------:|------:|\n"
        "| baseline  |     15 | 98.6% |\n"
        "| efficient |      8 | 97.5% |"
    )


def test_each_column_is_aligned_as_asked():
    assert table(("a", "b", "c"), [(1, 22, 333)], "><") == (
        "| a | b  |   c |\n|--:|----|----:|\n| 1 | 22 | 333 |"
    )


def test_a_bar_in_a_cell_does_not_end_it():
    lines = table(("run", "n"), [("a|b", 1), ("c", 22)]).splitlines()
    assert [line.replace(r"\|", "").count("|") for line in lines] == [3] * 4
    assert lines[2] == r"| a\|b |  1 |" and len({*map(len, lines)}) == 1


def test_rows_that_come_one_by_one_stand_under_their_titles():
    lines = Table(("px", "share"), ">", (4, 5))
    printed = [*lines.head().splitlines(), lines.row((96, "7%")), lines.row((224, "41%"))]
    assert printed == [
        "|   px | share |",
        "|-----:|------:|",
        "|   96 |    7% |",
        "|  224 |   41% |",
    ]


def test_a_table_without_rows_has_its_titles():
    assert table(("run",), []) == "| run |\n|-----|"
