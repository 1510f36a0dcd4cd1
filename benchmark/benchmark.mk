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
SMOLLM2_ARGS = --threads 1 --channels $(SMOLLM2)/channels.json --out $(SMOLLM2) --configs benchmark/configs/smollm2

.PHONY: smollm
smollm: $(VENV)/benchmark build $(SMOLLM2)/channels.json $(SMOLLM2)/topics.txt ## Measure SmolLM2 through the daemon into docs/smollm2.md (an hour; PYTHON_OF_TEXT=python3.11)
	$(SMOLLM2_RUN) benchmark/scripts/run_perplexity.sh $(SMOLLM2)/topics.txt $(SMOLLM2_ARGS)/*.json
	$(SMOLLM2_RUN) benchmark/scripts/run_perplexity.sh $(SMOLLM2)/topics.txt --emulate $(SMOLLM2_ARGS)/*_p85.json
	$(SMOLLM2_RUN) benchmark/scripts/run_passkey.sh --tokens 2048 --iterations 10 --question 160 $(SMOLLM2_ARGS)/*.json
	$(VENV_PYTHON) -m benchmark.summarize $(SMOLLM2)/result_*/smollm2 --plot docs/smollm2.svg >$(SMOLLM2)/table
	@{ printf '%s\n' \
		'# SmolLM2 through the daemon' '' \
		'SmolLM2-135M-Instruct in float32 on a CPU, one sequence, the two first layers dense, query heads of a KV head' \
		'united. Everything up to the tokens named is prefilled densely; from there, each goes through `twilightd`.' '' \
		'- Perplexity: tokens 4096 to 4607 of CPython 3.11.7'"'"'s `pydoc_data/topics.py`, topics sorted by key and joined by' \
		'  line breaks (PSF licence). `_emulated` is p = 0.85 once more, by a [plain emulation](../benchmark/emulation.py) in torch.' \
		'- Passkey: the share of right answers to ten prompts of 2048 tokens, whose last 160 characters are decoded. One' \
		'  answer is 0.1: differences of that size say nothing, as do those of 0.1 in perplexity.' '' \
		'Candidates are a quarter of the tokens, for StreamingLLM 4 sinks and the last 1020. `kept` and `mass` are means' \
		'over heads, steps and layers from 2 on, mass the true share of attention, measured on a tenth of the rows.' \
		'[The configs](../benchmark/configs/smollm2); Double Sparsity is calibrated on the text of our licence.' '' \
		'Twilight'"'"'s own figures, LongBench and RULER on models of 7B and 8B, take weights and data that a user brings: the' \
		'[harness](../benchmark/README.md) is ready for them, and they were not rerun.' '' \
		'    make smollm PYTHON_OF_TEXT=python3.11' '' \
		'![Score by tokens kept](smollm2.svg)' ''; cat $(SMOLLM2)/table; } >docs/smollm2.md

$(SMOLLM2)/topics.txt:
	@mkdir -p $(@D)
	$(PYTHON_OF_TEXT) -c 'from pydoc_data.topics import topics; print("\n".join(topics[k] for k in sorted(topics)), end="")' >$@

$(SMOLLM2)/channels.json: | build $(VENV)/benchmark
	@mkdir -p $(@D)
	$(VENV_PYTHON) benchmark/make_capture/make_capture.py --text LICENSE --tokens 2048 --steps 64 \
		--layers "$$(seq --separator , 0 29)" --out $(@D)/calibration.safetensors
	bin/twilight calibrate ds --capture $(@D)/calibration.safetensors --out $@
