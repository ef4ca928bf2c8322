"""The report of training runs: one HTML page that needs nothing else.

`ffssl report --help`
"""
