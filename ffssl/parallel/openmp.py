"""How the threads of torch's CPU operations wait."""

import os


def share_cores() -> None:
    """Let the threads that render views run while torch's threads wait.

    Call before torch is imported. OpenMP's threads spin while they wait, by default for so long
    that they starve the threads that render views. No spinning at all costs as much, in the many
    small operations of low resolutions.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
