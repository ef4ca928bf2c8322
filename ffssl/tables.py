"""Tables in Markdown whose columns line up, so that they read well in a terminal too."""

from collections.abc import Iterable, Sequence


class Table:
    """A table for a program that prints each row as it comes.

    titles: of the columns, which are as wide as their titles, or as `widths`.
    align: "<" (left) or ">" (right) for each column; right where it is too short.
    """

    def __init__(self, titles: Sequence[str], align: str = "<", widths: Iterable[int] = ()):
        self._titles, self._align = titles, align.ljust(len(titles), ">")
        self._widths = [*widths] or [*map(len, titles)]

    def head(self) -> str:
        """Return the two lines above the rows."""
        rule = (
            "-" * (width + 1) + ("-" if side == "<" else ":")
            for side, width in zip(self._align, self._widths)
        )
        return f"{self.row(self._titles)}\n|{'|'.join(rule)}|"

    def row(self, cells: Iterable[object]) -> str:
        texts = (_escaped(cell) for cell in cells)
        padded = (
            f"{text:{side}{width}}"
            for text, side, width in zip(texts, self._align, self._widths, strict=True)
        )
        return f"| {' | '.join(padded)} |"


def table(titles: Sequence[str], rows: Iterable[Sequence[object]], align: str = "<") -> str:
    """Return a whole table, see `Table`. Its columns are as wide as their widest cell."""
    rows = list(rows)
    widths = (max(len(_escaped(cell)) for cell in column) for column in zip(titles, *rows))
    lines = Table(titles, align, widths)
    return "\n".join([lines.head(), *map(lines.row, rows)])


def _escaped(cell: object) -> str:
    return str(cell).replace("|", r"\|")
