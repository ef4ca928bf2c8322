"""The report of training runs: one HTML page that needs nothing else.

`python -m ffssl.report --help`
"""
