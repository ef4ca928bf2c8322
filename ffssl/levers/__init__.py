"""The three levers for a training loop of one's own: docs/levers.md shows each in use.

They need no options, no files and no run. `import ffssl` offers them by name.
"""
