# Needs make and Python 3.11 or newer; each target installs into .venv what it lacks, once.
#   make train ARGS="--epochs 5"         make test ARGS="-k adam"         make train PYTHON=/path/to/python3.11

PYTHON ?=
MODULE ?= benchmarks.s1
ARGS ?=

# Held in the build environment too: newer pip reads the second name there, older pip the first.
export PIP_CONSTRAINT = constraints.txt
export PIP_BUILD_CONSTRAINT = constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help train test test-slow lint bench clean
.NOTPARALLEL:
.SECONDARY:

help:
	@echo "make train   train the digit classifier"
	@echo "make test    run all tests but the slow ones"
	@echo "make test-slow   run the slow ones"
	@echo "make lint    ruff and pyright"
	@echo "make bench   compare speed with other libraries"
	@echo "make clean   remove the environments and caches"

train: .venv/.installed-experiments
	.venv/bin/python -m experiments.digits_mlp $(ARGS)

test: .venv/.installed-test
	.venv/bin/python -m pytest -n 2 $(ARGS)

test-slow: .venv/.installed-test
	.venv/bin/python -m pytest -n 2 -m slow $(ARGS)

lint: .venv/.installed-lint .venv/.installed-test
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m pyright --pythonpath .venv/bin/python

bench: .venv-bench/.installed
	.venv-bench/bin/python -m $(MODULE) $(ARGS)

clean:
	rm -rf .venv .venv-bench .pytest_cache .ruff_cache .hypothesis

.venv/.installed-%: .venv/.created pyproject.toml constraints.txt
	.venv/bin/python -m pip install --editable ".[$*]"
	@touch $@

.venv-bench/.installed: .venv-bench/.created pyproject.toml constraints.txt benchmarks/requirements.txt
	.venv-bench/bin/python -m pip install --editable . --requirement benchmarks/requirements.txt
	@touch $@

# Prints the version, and whether venv is missing as in Debian's python3; succeeds if the interpreter will do.
PROBE = import sys, importlib.util as util; venv = all(map(util.find_spec, ("venv", "ensurepip"))); \
	print("%d.%d.%d" % sys.version_info[:3] + ("" if venv else " without venv")); \
	sys.exit(not venv or sys.version_info < (3, 11))

# A shim may stand in for a version that is not installed, so each candidate is run, not only found.
.venv/.created .venv-bench/.created:
	@seen=; \
	for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11 python3.14); do \
	    if version=$$("$$python" -c '$(PROBE)' 2>/dev/null); then \
	        echo "creating $(@D) with Python $$version ($$python)"; \
	        "$$python" -m venv --clear $(@D) && touch $@; exit; \
	    fi; \
	    seen="$$seen  $$python: $${version:-does not run}\n"; \
	done; \
	printf '%b' "error: fnet needs Python 3.11 or newer with its venv module; found\n$$seen" \
	    "Install one (Debian, Ubuntu: apt install python3-venv) or name one:" \
	    " make $(firstword $(MAKECMDGOALS)) PYTHON=/path/to/python3.11\n" >&2; \
	exit 1
