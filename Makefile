# `make demo` and `make test` set up everything they need on a fresh machine: Python >= 3.11 with venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check slow clean
demo: .venv/ready
	$(BIN)/entprog demo

test: .venv/ready
	$(BIN)/python -m pytest

slow: .venv/ready
	$(BIN)/python -m pytest -m slow

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# torch first: what is installed before the rest is kept, and nothing below pulls another build
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,people,pose,faces,wan]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps anny
	touch $@

clean:
	rm -rf .venv build dist src/*.egg-info
