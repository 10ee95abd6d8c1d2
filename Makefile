# `make demo` and `make test` need Python 3.11 or newer and a package index, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIXART := PixArtAlphaPipeline PixArtSigmaPipeline
DIFFUSERS_VERSIONS := 0.36.0 0.39.0 0.42.1
# Ranks share the cores, so each keeps to one thread. The hub is never asked.
export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1

.PHONY: help install demo test scope coverage lint format test-versions clean

help:
	@echo "make demo           one port from command to picture, on two processes of this machine"
	@echo "make test           the whole suite"
	@echo "make scope          every pipeline ported and imported, text to image run in one mode"
	@echo "make coverage       port and prove every pipeline; write docs/coverage.md"
	@echo "make lint           ruff, black, mypy, porter check"
	@echo "make format         let ruff and black rewrite what they can"
	@echo "make test-versions  prove both PixArt ports on diffusers $(DIFFUSERS_VERSIONS)"
	@echo "make clean          remove the environments and everything built"

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: $$($(PYTHON) --version), expected Python 3.11 or newer; name one: make PYTHON=python3.11" >&2; exit 2; }
	@echo "==> Making the virtual environment $(VENV) from constraints.txt"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: RUN := xfuser_runtime.run PixArtAlphaPipeline --model demo/checkpoint \
    --generated demo/generated --height 256 --width 256 --no_use_resolution_binning \
    --num_inference_steps 20 --prompt "a small cactus with a happy face in the desert"
demo: RANKS := $(BIN)/torchrun --standalone --nproc_per_node=2 -m $(RUN)
demo: install
	@rm -rf demo
	@echo "==> 1/6 A tiny checkpoint folder with random weights"
	$(BIN)/porter make-checkpoint PixArtAlphaPipeline demo/checkpoint
	@echo "==> 2/6 The port: diffusers' source, rewritten by rule"
	$(BIN)/porter add-model PixArtAlphaPipeline --output demo/generated
	@echo "==> 3/6 The proof: two parallel modes against stock diffusers"
	$(BIN)/porter verify PixArtAlphaPipeline --modes cfg2,ulysses2 --output demo/generated
	@echo "==> 4/6 Stock diffusers, one process"
	$(BIN)/python -m $(RUN) --stock --output demo/stock.png
	@echo "==> 5/6 The port on two processes: one for each branch of guidance"
	$(RANKS) --use_cfg_parallel --output demo/cfg.png --reference demo/stock.png
	@echo "==> 6/6 The port on two processes: half of the tokens each (Ulysses)"
	$(RANKS) --ulysses_degree 2 --output demo/ulysses.png --reference demo/stock.png
	@echo "==> Done: demo/stock.png, demo/cfg.png and demo/ulysses.png show the same pattern"
	@echo "    (random weights draw no cactus). Each edit with its rule:"
	@echo "    $(BIN)/porter diff PixArtAlphaPipeline --output demo/generated"

test: install
	@echo "==> The whole suite"
	@$(BIN)/pytest --numprocesses 2 --dist loadfile

scope: install
	@echo "==> Every pipeline: a port that imports, or a refusal; text to image passes one mode"
	@PORTER_SCOPE=1 $(BIN)/pytest tests/scope/test_every_pipeline.py

# Starts where an earlier run stopped: what is proven stays so while its sources do.
coverage: install
	-$(BIN)/porter add-model --all
	-$(BIN)/porter verify --tier core --missing --processes 2
	$(BIN)/porter coverage --markdown docs/coverage.md --json docs/coverage.json > /dev/null

lint: install
	@status=0; \
	for command in "ruff check ." "black --check ." mypy "porter check"; do \
	    echo "==> $$command"; $(BIN)/$$command || status=1; \
	done; exit $$status

format: install
	@$(BIN)/ruff check --fix .
	@$(BIN)/black .

# Each release of diffusers in an environment of its own, with the hub client it asks for.
test-versions: $(addprefix test-diffusers-,$(DIFFUSERS_VERSIONS))

test-diffusers-%:
	@echo "==> diffusers $*: its environment, .venvs/$*"
	@mkdir -p .venvs
	@sed -E '/^(diffusers|huggingface_hub)==/d' constraints.txt > .venvs/constraints.txt
	@$(PYTHON) -m venv .venvs/$*
	@.venvs/$*/bin/pip install -qq --constraint .venvs/constraints.txt --editable '.[captions]' diffusers==$*
	@echo "==> diffusers $*: both ports, made and proven"
	.venvs/$*/bin/porter add-model $(PIXART) --output .venvs/$*/generated
	.venvs/$*/bin/porter verify $(PIXART) --output .venvs/$*/generated

clean:
	rm -rf $(VENV) .venvs demo dist .mypy_cache .pytest_cache .ruff_cache
