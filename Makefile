# Each target makes .venv if there is none and installs what it needs, nothing else.
# make bench BALM=PATH: with a checkout of github.com/brineylab/BALM, compares with that, too.
PYTHON ?= python3
export PIP_DISABLE_PIP_VERSION_CHECK = 1
BIN := .venv/bin
NEW_ENOUGH = $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
	"moe_ablm needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." \
	% tuple(sys.version_info[:2]))'

.PHONY: .venv-aot quickstart test test-slow test-slurm test-aot lint bench docs

quickstart: .venv/.run
	$(BIN)/python -m moe_ablm quickstart
	@echo "next: . .venv/bin/activate && python -m moe_ablm --help   (README.md, from step 2 on)"

test: .venv/.test
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-slow: .venv/.test .venv/.hf .venv/.docs
	$(BIN)/python -m pytest --slow

# as root, on Debian or where SLURM and munge are installed; skipped, with the reason, elsewhere
test-slurm: .venv/.test
	$(BIN)/python -m pytest -m slurm -rs tests/test_slurm.py

# compiles for TPUs and GPUs that are not here: some 20 minutes on two cores
test-aot: .venv-aot
	.venv-aot/bin/python -m pytest -m aot -rs --numprocesses auto --dist loadgroup tests/test_aot.py

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the site of docs/ in site/; a warning, such as a link to nowhere, is an error
docs: .venv/.docs
	$(BIN)/python -m mkdocs build --strict

bench: .venv/.hf
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/moe_block.py
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/loader.py
	test -z "$(BALM)" || $(BIN)/python benchmarks/balm_moe.py --balm "$(BALM)"

$(BIN)/python:
	@$(NEW_ENOUGH)
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.run: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/.test: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test,eval,hub,completion]'
	touch $@ .venv/.run

.venv/.hf: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[hf,anndata]'
	touch $@ .venv/.run

.venv/.docs: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[docs,notebooks,app,browser]'
	touch $@ .venv/.run

.venv-aot: .venv-aot/.done

# the compilers of TPUs (libtpu) and of NVIDIA's GPUs (CUDA plug-in, cuDNN, ptxas); 4 GB
.venv-aot/.done: setup.py
	@$(NEW_ENOUGH)
	$(PYTHON) -m venv .venv-aot
	.venv-aot/bin/python -m pip install --quiet --editable '.[test,aot]'
	touch $@
