# Every target does its own set-up: a virtual environment in .venv, then the extras it needs.
#
#   PYTHON=python3.12   the interpreter to build .venv with (3.11 or newer)
#   ARGS="..."          passed on to what `train`, `test`, `mutants`, `soak` and `bench` run
#   DEVICE=cuda         trains on a GPU
#   BENCHMARKS="..."    what `bench` measures anew, e.g. "small_ops growth", instead of everything

PYTHON ?= python3
PY := .venv/bin/python
STAMPS := .venv/.stamps
BENCHMARKS ?=

.DEFAULT_GOAL := help
.PHONY: help train test test-emulated-gpu mutants soak lint format bench docs clean distclean
# Two pips in one environment would trip over each other.
.NOTPARALLEL:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' Makefile

train: $(STAMPS)/train ## train on Fashion-MNIST, e.g. make train ARGS="--recipe modern"
	$(PY) examples/fashion_mnist.py $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

test: $(STAMPS)/test ## run all tests and doctests, e.g. make test ARGS="-k batch_norm"
	$(PY) -m pytest $(ARGS)

# Real CuPy, in a virtual environment of its own, above CUDA's libraries written for the CPU.
test-emulated-gpu: ## run the tests for a GPU where there is none (tests/gpu/emulator; needs g++)
	"$(PYTHON)" -m tests.gpu.emulator.build build/emulated-gpu
	CUPY_ACCELERATORS= CUPY_CACHE_IN_MEMORY=1 TINYGRAD_BN_EMULATED_GPU=1 \
	  build/emulated-gpu/bin/python -m pytest --require-gpu -m gpu $(ARGS)

mutants: $(STAMPS)/test ## let the verification kit find planted faults; writes docs/mutants.md
	$(PY) -m tests.mutants $(ARGS)

soak: $(STAMPS)/test ## let the kit search correct code for faults, with 10,000 examples
	$(PY) -m tests.mutants.soak $(ARGS)

lint: $(STAMPS)/dev ## check style, formatting and types
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyrefly check --python-interpreter-path $(PY)

format: $(STAMPS)/dev ## format the code and apply the safe fixes
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

bench: $(STAMPS)/bench ## measure beside other libraries (installs PyTorch, which is large)
	$(PY) benchmarks/report.py --measure $(BENCHMARKS) $(ARGS)

docs: $(STAMPS)/test ## run the examples in the documents, and say where these are
	$(PY) -m pytest $(wildcard README.md docs)
	@echo "The documents are README.md and docs/; every public name has a docstring."

clean: ## remove caches and build products; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name .venv -prune -o -name runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf .venv

# An editable install is bound to its folder, so the stamp names the folder: a tree that was moved or
# copied gets a fresh set-up, and so does one whose interpreter is gone. A PYTHON named outright counts
# where .venv was made with another version; the default leaves a .venv that works alone.
ifneq ($(shell test -x $(PY) && cat $(STAMPS)/venv 2>/dev/null),$(CURDIR))
.PHONY: $(STAMPS)/venv
else ifneq ($(origin PYTHON),file)
ifneq ($(shell $(PY) -VV 2>&1),$(shell "$(PYTHON)" -VV 2>&1))
.PHONY: $(STAMPS)/venv
endif
endif

$(STAMPS)/venv:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "tinygrad_bn needs Python 3.11 or newer; $(PYTHON) -V says: $$("$(PYTHON)" -V 2>&1)" >&2; \
	  echo "Name another interpreter, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	  exit 1; }
	@[ "$$($(PY) -VV 2>&1)" = "$$("$(PYTHON)" -VV 2>&1)" ] || rm -rf .venv
	@echo "Making .venv with $$("$(PYTHON)" -V)"
	@"$(PYTHON)" -m venv .venv
	@rm -rf $(STAMPS) && mkdir $(STAMPS) && pwd -P > $@

# Training should be fast where it can be; what runs on NumPy alone is a smaller install by hand.
$(STAMPS)/train: EXTRAS = train,fast
$(STAMPS)/%: EXTRAS = $*

# One stamp for each extra, so that `make test` need not install what only `make bench` uses.
$(STAMPS)/%: pyproject.toml $(STAMPS)/venv
	@echo "Installing tinygrad_bn[$(EXTRAS)] into .venv"
	@$(PY) -m pip install --quiet --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@
