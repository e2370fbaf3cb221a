# make demo       install, upsample a bundled photograph's features, say where the picture is
# make page       install, serve the web page on this machine, say its address
# make test       install with every extra; run every test that needs no GPU
# make test-fast  install the core; run the quick tests
# make lint       style and types (after make test's install)
# make docs      build the documentation's site into build/site (after make test's install)
# make sanitize   build the C++ kernels with AddressSanitizer and UBSan and drive them
# make clean      remove what the above made
#
# PYTHON=python3.12 make demo   chooses the interpreter (3.10 or newer).
# JOBS=8 make test              runs the tests in eight processes instead of two.

PYTHON ?= python3
ARGS ?=
JOBS ?= 2
PHOTO ?= examples/photos/coffee.jpg

CORE := .venv
FULL := .venv-full
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*) Makefile
PIP := -m pip --disable-pip-version-check install --quiet -c constraints.txt
# Several processes of one thread each are faster than one of several threads; a file that takes long
# is shared out as well.
PYTEST := -m pytest -n $(JOBS) --dist worksteal
test test-fast: export OMP_NUM_THREADS = 1

.PHONY: demo page test test-fast lint docs sanitize clean
.SUFFIXES:
.DELETE_ON_ERROR:

demo: $(CORE)/.core
	@$(CORE)/bin/upfeat run $(PHOTO) -o out
	@echo "The picture: $(abspath out)/$(basename $(notdir $(PHOTO))).features.png"

page: $(CORE)/.page
	@$(CORE)/bin/upfeat demo $(ARGS)

test: $(FULL)/.all
	@$(FULL)/bin/python $(PYTEST) $(ARGS)

test-fast: $(CORE)/.test
	@$(CORE)/bin/python $(PYTEST) -m "not slow" $(ARGS)

lint: $(FULL)/.all
	@$(FULL)/bin/ruff check .
	@$(FULL)/bin/ruff format --check .
	@$(FULL)/bin/pyright --warnings --pythonpath $(FULL)/bin/python

docs: $(FULL)/.all
	@NO_MKDOCS_2_WARNING=1 $(FULL)/bin/python -m mkdocs build --quiet
	@echo "The site: $(abspath build/site/index.html)"

sanitize:
	@bash csrc/sanitize/run.sh

clean:
	rm -rf $(CORE) $(FULL) out build

# PyTorch first and alone, so that a constrained, already downloaded build is taken.
%/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "upfeat needs Python 3.10 or newer, and PYTHON=$(PYTHON) is not (\"$$($(PYTHON) --version 2>&1 | head -n 1)\"); choose another: make PYTHON=python3.12 …"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv) or choose another: make PYTHON=python3.12 …"; exit 1; }
	@echo "Making the environment $* …"
	@$(PYTHON) -m venv $*
	@echo "Installing PyTorch …"
	@$*/bin/python $(PIP) torch
	@touch $@

$(CORE)/.core: $(CORE)/.torch $(SOURCES)
	@echo "Installing upfeat …"
	@$(CORE)/bin/python $(PIP) -e .
	@touch $@

$(CORE)/.page: $(CORE)/.core
	@$(CORE)/bin/python $(PIP) -e '.[demo]'
	@touch $@

$(CORE)/.test: $(CORE)/.core
	@$(CORE)/bin/python $(PIP) -e '.[test]'
	@touch $@

$(FULL)/.all: $(FULL)/.torch $(SOURCES)
	@echo "Installing upfeat with all extras …"
	@$(FULL)/bin/python $(PIP) -e '.[dev]'
	@$(FULL)/bin/python $(PIP) ftfy
	@# Without what they depend on, so that the PyTorch that is there stays.
	@$(FULL)/bin/python $(PIP) --no-deps timm torchvision open_clip_torch
	@touch $@

CMakeLists.txt:
