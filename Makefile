# `make demo`, `make lint` and `make test` do all the set-up they need: see scripts/setup.sh.
.PHONY: help setup demo lint test wheelhouse clean

help:
	@echo 'make demo        run the main job, small, on this machine'
	@echo 'make test        run the tests; ARGS="--slow -k loader" are passed on to pytest'
	@echo 'make lint        look for faults, wrong types and lines that are not formatted; ruff format mends those'
	@echo 'make setup       only install what those three need, in .venv and, where allowed, with apt-get'
	@echo 'make wheelhouse  wheels of FFSSL and FFCV for a machine without network: make wheelhouse PYTHON=3.12'
	@echo 'make clean       remove .venv and everything built'
	@echo 'PYTHON=3.12, or a path, chooses the Python (3.11, 3.12 or 3.13).'

setup:
	@bash scripts/setup.sh

demo: setup
	.venv/bin/python -m ffssl.demo $(ARGS)

test: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --maxprocesses=4 --dist=loadfile $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

wheelhouse:
	@bash scripts/wheelhouse.sh

clean:
	rm -rf .venv .cache build dist wheelhouse *.egg-info .pytest_cache .ruff_cache .mypy_cache
