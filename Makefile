# Two commands do everything: `make compare` and `make test`; `make bench` measures what a training step costs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: compare test bench docs install format clean

compare: install ## Compare normalisers on the embedded digits; prints a table and the path of the report.
	$(BIN)/normprop compare --study digits --data digits --train 500 --validation 200 --model nin --width 0.25 \
	  --epochs 4 --methods none,batch,group,normprop,normprop-paper --batch-sizes 2,8,32 \
	  --lrs 0.003,0.01,0.03,0.1 --seeds 0,1

test: install ## Lint, types and tests.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

bench: install ## Time training steps against the network without normalisation; within about ten minutes.
	$(BIN)/normprop bench --networks nin,resnet18,mlp,unet3d --batch-sizes 1,8 --seconds 15

docs: install ## Write the pages that are generated.
	$(BIN)/normprop methods --markdown > docs/methods.md

install: $(VENV)/installed

# Without an NVIDIA driver the CPU build of torch is asked for first, wherever pip is configured to look (for example
# PIP_EXTRA_INDEX_URL set to PyTorch's index of CPU builds); only where there is none does pip choose.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "normprop needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	@command -v nvidia-smi >/dev/null 2>&1 || $(PIP) install -q -c constraints.txt 'torch==$(TORCH)+cpu' 2>/dev/null \
	  || echo 'No CPU build of torch $(TORCH) found where pip looks; installing the default build, which may bring CUDA.'
	$(PIP) install -q -c constraints.txt -e '.[all,dev]'
	touch $@

format: install ## Put the code into the project's format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and the runs.
	rm -rf $(VENV) runs
