"""Convert images to FFCV's .beton files: `ffssl convert`, as a program of the checkout."""

import sys

from ffssl.config.command_line import exit_status
from ffssl.data.convert.__main__ import main

if __name__ == "__main__":
    sys.exit(exit_status(lambda: main("write_datasets.py")))
