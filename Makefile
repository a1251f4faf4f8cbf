# Everything happens in .venv, a virtual environment in the project's root.

BIN := .venv/bin
JOBS ?= 2

# True of a Python that is new enough and can make a virtual environment with pip in it.
USABLE := import sys; assert sys.version_info >= (3, 11); import ensurepip, venv

# The first usable one; plain python3 if there is none, and `install` then says what to do.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	"$$python" -c '$(USABLE)' 2>/dev/null && { echo "$$python"; exit; }; done; echo python3)

.PHONY: help install test demo docs clean-install clean

help:
	@echo 'make install   put vqlm, editable, with all it needs into .venv'
	@echo 'make demo      train, evaluate and sample a small model on the CPU'
	@echo 'make test      format, lint and type checks, then the tests, on JOBS=$(JOBS) processes'
	@echo 'make docs      the documentation site, into build/site'
	@echo 'make clean-install   install in a clean environment of PYTHON, and use it'
	@echo 'make clean     remove .venv, the caches and the build leftovers'
	@echo
	@echo 'PYTHON=python3.12 chooses the Python of a new .venv; it must be 3.11 or newer.'

install: .venv/.installed

# Everything, and the part of it that the demo and the commands to try after it need.
.venv/.installed: EXTRAS := dev
.venv/.for-demo: EXTRAS := train,plot,play,data

.venv/.installed .venv/.for-demo: pyproject.toml constraints.txt
	@python='$(PYTHON)'; "$$python" -c '$(USABLE)' 2>/dev/null || { \
	  echo "vqlm needs Python 3.11 or newer, with its venv and ensurepip modules." >&2; \
	  echo "Got PYTHON=$$python: $$("$$python" --version 2>&1 | head -n 1)" >&2; \
	  echo "Install one and name it: make PYTHON=python3.12 $(or $(MAKECMDGOALS),install)" >&2; \
	  echo "(Debian and Ubuntu keep these modules in the package python3-venv.)" >&2; \
	  exit 1; }
	@# An environment without pip is what an interrupted run leaves behind: start it over.
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  echo "making .venv with $(PYTHON)"; "$(PYTHON)" -m venv --clear .venv; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# One thread per process: torch's own threads would fight over the cores with the JOBS processes.
test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	for version in 3.12 3.13 3.14; do $(BIN)/mypy --python-version $$version || exit 1; done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

demo: $(if $(wildcard .venv/.installed),.venv/.installed,.venv/.for-demo)
	$(BIN)/vqlm demo

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean-install:
	$(PYTHON) tests/clean_install.py $(PYTHON)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find vqlm tests -type d -name __pycache__ -exec rm -rf {} +
