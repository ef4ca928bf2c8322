"""What programs print in tables, read back."""


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of every row of the Markdown tables in `text`, titles included."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
