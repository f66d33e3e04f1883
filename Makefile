# make demo   pre-train a small masked autoencoder on synthetic galaxies, show what it sees, evaluate it by five methods
# make test   the whole test suite
# Both set up .venv first, once; PYTHON chooses the interpreter it is made with.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/python -m galaxy_mae.galaxy10 synthetic --image_size 64 --contact_sheet runs/demo_galaxies.png
	$(BIN)/python main.py --config recipes/demo.yaml --report_to none
	$(BIN)/python linear_probe_checkpoints.py --encoder runs/demo --config recipes/evaluation_demo.yaml
	@echo
	@echo "galaxies:        runs/demo_galaxies.png"
	@echo "reconstructions: runs/demo/reconstruction_example.png, and over the epochs in runs/demo/reconstructions/"
	@echo "evaluation:      results/demo/report.md, accuracy.png, and a confusion matrix for each method"

test: $(VENV)/.installed-tests lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The marker is newer than the requirements: the install is done once, and again when they change.
$(VENV)/.installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) runs results
