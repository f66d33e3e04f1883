# make demo        pre-train a small masked autoencoder on synthetic galaxies, show reconstructions, evaluate it
# make small DATASET=LABELLED.parquet UNLABELLED=MORE.parquet  pre-train a small encoder, by both stages
# make test        lint and all tests but those of test-benchmarks
# make test-fast   the tests without the slow ones: every module, about six minutes on two cores
# make test-benchmarks  that gpu.sh and the trials of chaos.py run: minutes
# make lint        ruff, the import contract, shellcheck
# make compat      tests of model, Trainer and export with the oldest and the newest supported transformers
# make docs        docs/ as a site in site/, every link checked
# make dist        a wheel in dist/: the package with its recipes and the pretrained models
# make install     the environment alone: everything, also what tests and lint need
# The environment .venv is made at the first call; PYTHON selects the interpreter that it is made with. WORKERS is the
# number of processes that run tests.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
# A file stays on one worker: its fixtures are made once, and there is a single Slurm cluster. In the order of
# tests/conftest.py Slurm's tests come first, which wait more than they compute, so that the others run beside them.
XDIST := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP := -m pip install --quiet --disable-pip-version-check
SCRIPTS := run_ssl run_survey run_linear_probe_array.sh slurm/job.sh benchmarks/gpu.sh benchmarks/chaos.sh .ci/run
COMPAT_VERSIONS := 5.17.0 newest
COMPAT_TESTS := $(addprefix tests/test_,mae.py encoder.py classifier.py trainer.py preemption.py fine_tuning.py main.py portability.py)

.PHONY: demo small docs dist test test-fast test-benchmarks lint compat install clean

# One thread in each process: the workers and the processes that tests start share the cores.
test test-fast test-benchmarks compat-%: export OMP_NUM_THREADS := 1

demo: $(VENV)/.installed
	$(BIN)/python -m galaxy_mae demo

# The same command resumes, also between the two stages. FLAGS are further ones of main.py, for both.
small: galaxies = $(or $(DATASET),$(error name your galaxies: make small DATASET=LABELLED.parquet))
small: flags = --dataset $(galaxies) $(if $(UNLABELLED),--unlabelled $(UNLABELLED)) --report_to none $(FLAGS)
small: $(VENV)/.installed
	$(BIN)/python main.py --config recipes/small.yaml $(flags)
	$(BIN)/python main.py --config recipes/student.yaml $(flags)

test: lint install
	$(BIN)/python -m pytest $(XDIST)

test-fast: lint
	$(BIN)/python -m pytest $(XDIST) -m "not slow"

test-benchmarks: install
	$(BIN)/python -m pytest benchmarks

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	@if command -v shellcheck >/dev/null; then shellcheck -x $(SCRIPTS); else echo "shellcheck is not installed: skipped"; fi

compat: $(COMPAT_VERSIONS:%=compat-%)

compat-%:
	$(PYTHON) -m venv .compat/$*
	grep -vE '^(transformers|tokenizers|huggingface)' constraints.txt > .compat/$*/constraints.txt
	grep -v '^transformers' requirements-core.txt > .compat/$*/requirements.txt
	.compat/$*/bin/python $(PIP) -r .compat/$*/requirements.txt -r requirements-dev.txt -c .compat/$*/constraints.txt \
	    wandb 'transformers$(if $(filter newest,$*),<6,==$*)'
	.compat/$*/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	.compat/$*/bin/python -m pytest $(XDIST) $(COMPAT_TESTS)

docs: $(VENV)/.installed-dev
	$(BIN)/python -m mkdocs build --quiet --strict

# What an earlier build left in build/ would be in the wheel.
dist: $(VENV)/.installed
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	rm -rf build

install: $(VENV)/.installed-all

# The markers are newer than the requirements: packages are installed once, and again when the requirements change.
# `make demo` takes the core, `make test-fast` and `make lint` what tests and lint need in addition, all others all.
$(VENV)/.installed: requirements-core.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -r requirements-core.txt -c constraints.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt pyproject.toml
	$(BIN)/python $(PIP) -r requirements-dev.txt -c constraints.txt
	$(BIN)/python $(PIP) --no-deps --editable .
	touch $@

$(VENV)/.installed-all: $(VENV)/.installed-dev requirements.txt
	$(BIN)/python $(PIP) -r requirements.txt -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) .compat build dist site runs results
