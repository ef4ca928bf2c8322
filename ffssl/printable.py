"""Names as text for people: those of files and classes may be no UTF-8, and hold line breaks."""


def printable(text: str) -> str:
    """`text` on one line, with what can't be printed written as Python writes it: \\n, \\udce9 for
    a byte that is no UTF-8.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
