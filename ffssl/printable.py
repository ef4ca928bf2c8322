"""Names of files and classes as printable text.

They may hold line breaks, or bytes that are not UTF-8.
"""


def printable(text: str) -> str:
    r"""Return `text` on one line, with unprintable characters escaped.

    They are written as Python writes them: \n, or \udce9 for a byte that is not UTF-8.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
