# make demo | test | lint | lock | demo-weights. The first two install what they need into .venv; a second call does not.
PYTHON ?= python3
BIN = .venv/bin
LOCK = requirements/cpu.lock
TORCH_INDEX = https://download.pytorch.org/whl/cpu

.PHONY: demo test test-slow lint lock demo-weights

.venv/ready: $(LOCK) pyproject.toml
	@echo "setting up .venv (about two minutes; PyTorch, transformers and the vLLM CPU engine)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps -r $(LOCK)
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet --no-deps --force-reinstall \
		--index-url $(TORCH_INDEX) $$(grep '^torch==' $(LOCK))
	$(BIN)/pip install --quiet --no-deps -e .
	$(BIN)/python -m persona.setup_check
	@touch $@

demo: .venv/ready
	$(BIN)/persona demo

# Two at a time, whole files: some start engines and servers, of a few GB each.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Resolves requirements/cpu.in again. uv comes into an environment of its own and is not part of the lock.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet uv
	.venv-lock/bin/uv pip compile --quiet requirements/cpu.in --override requirements/overrides.txt \
		--python-version 3.11 --no-annotate --custom-compile-command "make lock" --output-file $(LOCK)

# Rebuilds the committed demo LM, adapter and control from nothing (about 25 minutes on two cores).
demo-weights: .venv/ready
	$(BIN)/persona data shop --out build/shop
	$(BIN)/persona lm build adapters/demo/recipe.yaml --data build/shop --overwrite
	$(BIN)/persona train adapters/demo/recipe.yaml --data build/shop --llm adapters/demo/lm --overwrite
	$(BIN)/persona train adapters/demo/recipe.yaml --data build/shop --llm adapters/demo/lm --no-history --overwrite
