"""How the threads of torch's operations wait on a CPU."""

import os


def share_cores() -> None:
    """Let the threads that render views run while torch's wait.

    To be called before torch is imported.

    OpenMP's threads spin while they wait, for so long that on a CPU they starve the threads that
    render views; not at all costs as much in the many small operations of low resolutions.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
