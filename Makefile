# Needs make and Python 3.11 or newer; each target installs into .venv what it lacks, once.
#   make train ARGS="--epochs 5"         make test ARGS="-k adam"         make test PYTHON=/path/to/python3.12
# Another PYTHON makes .venv anew; VENV=.venv-other keeps a second one beside it.

PYTHON ?=
VENV ?= .venv
MODULE ?= benchmarks.s1
ARGS ?=

# Held in the build environment too: newer pip reads the second name there, older pip the first.
export PIP_CONSTRAINT = constraints.txt
export PIP_BUILD_CONSTRAINT = constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_INPUT = 1

comma := ,

# $(call install,FOLDER,WHAT,OPTIONS): what pip says goes to FOLDER/install.log; an error shows its end, or in CI all of it.
define install
	@echo "installing $(2) into $(1): a few minutes the first time; log: $(1)/install.log"
	@$(1)/bin/python -m pip install $(3) >$(1)/install.log 2>&1 </dev/null || { status=$$?; \
	    $(if $(CI),cat,tail -n 20) $(1)/install.log >&2; \
	    echo "error: $(2) could not be installed; all that pip says: $(1)/install.log" >&2; exit $$status; }
	@sed -n 's/^Successfully installed //p' $(1)/install.log | wc -w | { read n; echo "installed $$n packages"; }
endef

.PHONY: help train test test-long test-slow test-newest test-compile lint docs gallery bench bench-all clean
.NOTPARALLEL:
.SECONDARY:

help:
	@echo "make train   train the digit classifier"
	@echo "make test    run all tests but the long and the slow ones"
	@echo "make test-long   run the long ones: experiments, pages, resumed runs, many devices and processes"
	@echo "make test-slow   run the slow ones"
	@echo "make test-newest   run all tests but the slow ones on the newest releases of everything"
	@echo "make test-compile   compile for GPUs and TPUs that are not here (1.3 GB of compilers)"
	@echo "make lint    ruff and pyright"
	@echo "make docs    build the site, docs/_build/html/index.html"
	@echo "make gallery   draw the pictures of docs/gallery from runs of the experiments (an hour)"
	@echo "make bench   compare speed with other libraries"
	@echo "make bench-all   all benchmarks, their tables into benchmarks/results (half an hour)"
	@echo "make clean   remove the environments and caches"

train: $(VENV)/.installed-experiments
	$(VENV)/bin/python -m experiments.digits_mlp $(ARGS)

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -n 2 $(ARGS)

test-long: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -n 2 -m "long and not slow" $(ARGS)

test-slow: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -n 2 -m slow $(ARGS)

# Does what was released since break fnet? Always installs, and without constraints.
test-newest: export PIP_CONSTRAINT =
test-newest: export PIP_BUILD_CONSTRAINT =
test-newest: .venv-newest/.created
	$(call install,.venv-newest,the newest releases,--upgrade --upgrade-strategy eager --editable ".[test$(comma)loggers]")
	.venv-newest/bin/python -m pip freeze --exclude-editable
	.venv-newest/bin/python -m pytest -n 2 -m "not slow" $(ARGS)

# Nothing of the chips is needed, only NVIDIA's and Google's compilers.
test-compile: .venv-compile/.created
	$(call install,.venv-compile,the compilers for GPUs and TPUs,--editable ".[test$(comma)compile-cuda$(comma)compile-tpu]")
	.venv-compile/bin/python -m pytest -m "long or not long" tests/test_compile.py $(ARGS)

lint: $(VENV)/.installed-lint $(VENV)/.installed-test
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m pyright --pythonpath $(VENV)/bin/python

# A name that does not resolve, a link or an anchor that is not there, a missing picture or derivation fails it.
# All pages are read each time (-E): else Sphinx is silent the second time, and on pages whose links broke elsewhere.
docs: $(VENV)/.installed-docs
	$(VENV)/bin/python -m sphinx -b html -E -n -W --keep-going docs docs/_build/html $(ARGS)

# make gallery ARGS="--only optimizer_paths"; pages are taken by Debian's chromium.
gallery: $(VENV)/.installed-test
	$(VENV)/bin/python -m docs.generate.pictures $(ARGS)

bench: .venv-bench/.installed
	.venv-bench/bin/python -m $(MODULE) $(ARGS)

bench-all: .venv-bench/.installed
	.venv-bench/bin/python -m benchmarks $(ARGS)

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .hypothesis

$(VENV)/.installed-%: $(VENV)/.created pyproject.toml constraints.txt
	$(call install,$(@D),fnet[$*],--editable ".[$*]")
	@touch $@

.venv-bench/.installed: .venv-bench/.created pyproject.toml constraints.txt benchmarks/requirements.txt
	$(call install,$(@D),fnet and its peers,--editable . --requirement benchmarks/requirements.txt)
	@touch $@

# Prints the version, and whether venv is missing as in Debian's python3; succeeds if the interpreter will do.
PROBE = import sys, importlib.util as util; venv = all(map(util.find_spec, ("venv", "ensurepip"))); \
	print("%d.%d.%d" % sys.version_info[:3] + ("" if venv else " without venv")); \
	sys.exit(not venv or sys.version_info < (3, 11))

CANDIDATES = python3 python3.13 python3.12 python3.11 python3.14
.venv-newest/.created: CANDIDATES = python3.14 python3.13 python3.12 python3.11 python3

# A shim may stand in for a version that is not installed, so each candidate is run, not only found.
ENVIRONMENTS = $(sort $(VENV) .venv-bench .venv-compile .venv-newest)
$(ENVIRONMENTS:=/.created):
	@seen=; \
	for python in $(if $(PYTHON),"$(PYTHON)",$(CANDIDATES)); do \
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

# An environment of another Python than the PYTHON that is named is made anew, not used in its place.
ifneq ($(PYTHON),)
version = $(shell "$(1)" -c '$(PROBE)' 2>/dev/null)
.PHONY: $(foreach venv,$(ENVIRONMENTS),$(if $(filter-out $(call version,$(PYTHON)),$(call version,$(venv)/bin/python)),$(venv)/.created))
endif
