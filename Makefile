# `make demo` and `make test` need nothing but Python >= 3.11: both build .venv on first use.
# The constraints file is for CPU set-ups; with a GPU: make setup CONSTRAINTS=/dev/null
PYTHON ?= python3
CONSTRAINTS ?= constraints-cpu.txt
BIN := .venv/bin
STAMP := .venv/.installed

# What `make demo` captions at its end: real files where they are at hand, else sounds of the demo's own world.
FILES ?= $(wildcard ../shared/data/videos/*.mp4) $(wordlist 1,6,$(wildcard ../shared/data/stamps/*.ogg))

.PHONY: setup demo demo-vipant ablation test hf-tests docs lint typecheck clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $@

# The class of the captioner: llava or gemma3.
CAPTIONER ?= llava
DEMO := runs/demo$(if $(filter-out llava,$(CAPTIONER)),-$(CAPTIONER))

demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m examples.sounding_world.demo --captioner $(CAPTIONER) --output $(DEMO)
	HF_HUB_OFFLINE=1 $(BIN)/dali caption --model $(DEMO)/model $(or $(strip $(FILES)),$(DEMO)/samples/*.wav)

demo-vipant: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m examples.sounding_world.demo_vipant

ablation: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m examples.sounding_world.ablation

# One thread a process: many tests start processes of their own, and threads would fight for the cores.
test: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --cov --cov-report term

# transformers' own common tests: they come with its source distribution, which is unpacked outside the project.
SOURCES ?= $(HOME)/.cache/dali-audio

hf-tests: $(STAMP)
	version=$$($(BIN)/python -c "import transformers; print(transformers.__version__)") && \
	{ test -d $(SOURCES)/transformers-$$version/tests || { \
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --dest $(SOURCES) transformers==$$version && \
	tar -xzf $(SOURCES)/transformers-$$version.tar.gz -C $(SOURCES); }; } && \
	TRANSFORMERS_SOURCE=$(SOURCES)/transformers-$$version HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
	$(BIN)/python -m pytest tests/hf_common

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP)
	$(BIN)/mypy
	$(BIN)/mypy --strict -p trainers.losses

clean:
	rm -rf .venv build dist site *.egg-info .coverage*
