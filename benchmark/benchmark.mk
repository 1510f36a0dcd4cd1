# The benchmarks' own Python, checked and tested with the SDK's.

$(VENV)/benchmark: benchmark/pyproject.toml $(VENV)/made | $(BIN)/uv
	uv pip install --quiet --python $(VENV_PYTHON) --group benchmark/pyproject.toml:dev
	@touch $@

.PHONY: benchmark-lint
python-lint: benchmark-lint
benchmark-lint: $(VENV)/benchmark
	$(VENV)/bin/ruff format --diff benchmark
	$(VENV)/bin/ruff check benchmark
	$(VENV)/bin/pyright --project benchmark --pythonpath $(VENV_PYTHON)

.PHONY: benchmark-test
python-test: benchmark-test
benchmark-test: $(VENV)/benchmark
	$(VENV_PYTHON) -m pytest --config-file benchmark/pyproject.toml benchmark/tests

SMOLLM2 := $(abspath $(TMP))/smollm2
# The text whose perplexity docs/smollm2.md has, of CPython 3.11: pydoc_data's topics, sorted and joined.
PYTHON_OF_TEXT ?= python3
SMOLLM2_RUN = TWILIGHT_PYTHON=$(abspath $(VENV_PYTHON))
SMOLLM2_ARGS = --threads 1 --configs benchmark/configs/smollm2/*.json --channels $(SMOLLM2)/channels.json --out $(SMOLLM2)

.PHONY: smollm
smollm: $(VENV)/benchmark build $(SMOLLM2)/channels.json $(SMOLLM2)/topics.txt ## Measure SmolLM2 through the daemon into docs/smollm2.md (an hour; PYTHON_OF_TEXT=python3.11)
	$(SMOLLM2_RUN) benchmark/scripts/run_perplexity.sh $(SMOLLM2)/topics.txt --emulate $(SMOLLM2_ARGS)
	$(SMOLLM2_RUN) benchmark/scripts/run_passkey.sh --tokens 1024 2048 --iterations 10 --question 160 $(SMOLLM2_ARGS)
	$(VENV_PYTHON) -m benchmark.summarize $(SMOLLM2)/result_*/smollm2 --plot docs/smollm2.svg >$(SMOLLM2)/table
	@cat benchmark/smollm2.md $(SMOLLM2)/table >docs/smollm2.md

$(SMOLLM2)/topics.txt:
	@mkdir -p $(@D)
	$(PYTHON_OF_TEXT) -c 'from pydoc_data.topics import topics; print("\n".join(topics[k] for k in sorted(topics)), end="")' >$@

$(SMOLLM2)/channels.json: | build $(VENV)/benchmark
	@mkdir -p $(@D)
	$(VENV_PYTHON) benchmark/make_capture/make_capture.py --text LICENSE --tokens 2048 --steps 64 \
		--layers "$$(seq --separator , 0 29)" --out $(@D)/calibration.safetensors
	bin/twilight calibrate ds --capture $(@D)/calibration.safetensors --out $@
