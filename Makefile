# Two commands are enough: `make demo` and `make test`. Each builds .venv when it is missing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OUT    ?= runs/demo
SEED   ?= 0

MODEL  ?= models/emoji

.PHONY: demo page test test-browser lab-smoke compile-check gpu lint format clean model-for-page

demo: $(STAMP)
	$(BIN)/trigflow demo --out $(OUT) --seed $(SEED)

# A page that draws what is typed; another model that reads words with MODEL=FOLDER.
page: model-for-page $(STAMP)
	$(BIN)/trigflow serve $(MODEL) --open

model-for-page:
	$(if $(wildcard $(MODEL)/model.json),@:,$(error no model in '$(MODEL)'; expected a folder with model.json; name one: make page MODEL=runs/demo))

# Two processes of one thread each: the tensors of the tests are tiny. Tests are compiled once, not at every start.
test: $(STAMP)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/browser

# The page of `trigflow serve` in Chromium, by itself: its clocks like a quiet machine. Fails where there is no Chromium; plain
# `pytest` leaves these tests out there.
test-browser: $(STAMP)
	TRIGFLOW_BROWSER=required $(BIN)/python -m pytest tests/browser

# One tiny cell of every study.
lab-smoke: $(STAMP)
	rm -rf runs/lab-smoke
	$(BIN)/python -m studies all --smoke --out runs/lab-smoke

# Are compiled tangents those of the engine? On a CPU about ten minutes, less with a warm cache.
compile-check: $(STAMP)
	$(BIN)/python benchmarks/compile_check.py --ratio --json runs/compile-check.json

# On a machine with CUDA: are its paths right, and what do steps cost? See docs/gpu.md.
gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py --minutes 8 --out runs/gpu

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The stamp is written last, so an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "trigflow needs Python 3.10 or newer; found " + sys.version.split()[0] + "; run: make PYTHON=/path/to/python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
