# Style after https://tech.davis-hansson.com/p/make/
SHELL := bash
.DELETE_ON_ERROR:
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --warn-undefined-variables
MAKEFLAGS += --no-builtin-rules
MAKEFLAGS += --no-print-directory

GO ?= go
# Arguments of the demo: make demo ARGS=--json
ARGS ?=
# At least 3.10.
PYTHON ?= python3
# Which benchmarks to run, and where.
BENCH ?= .
BENCH_PACKAGES ?= ./...
# How long to fuzz each target, and which. A count, since in Go 1.26 reaching a time can itself
# fail the run (https://go.dev/issue/75804).
FUZZTIME ?= 10000x
FUZZ ?= Fuzz
# Where goroutines meet.
RACE_PACKAGES ?= $(patsubst %,./%/...,$(wildcard service client gpu internal telemetry))
# The commit whose clients must go on working; empty: see breaking.
BREAKING_AGAINST ?=

TMP := .tmp
BIN := $(TMP)/bin
PINS := $(TMP)/pins
export PATH := $(abspath $(BIN)):$(PATH)

BUF_VERSION := v1.75.0
GOLANGCI_LINT_VERSION := v2.15.0
PHOENIX_VERSION := 20.26.1
UV_VERSION := 0.13.9
PLAYWRIGHT_VERSION := 1.65.1
GRPCURL_VERSION := v1.9.4
PROTOC_GEN_GO_VERSION := v1.36.12
PROTOC_GEN_GO_GRPC_VERSION := v1.6.2
GRPCIO_TOOLS_VERSION := 1.76.0

.PHONY: help
help: ## Describe the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "%-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build the commands into bin/: static, no cgo
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/ ./cmd/...

.PHONY: demo
demo: ## Run the demo (ARGS=--json)
	$(GO) run ./cmd/twilight demo $(ARGS)

# The capture to judge by, another of the same model to calibrate on, and which of its layers.
CAPTURE ?= smollm2-8k.safetensors
CALIBRATION ?= smollm2-calibration.safetensors
LAYERS ?= 2,9,17,25

.PHONY: methods
methods: ## Compare all methods into docs/methods.md and .svg (CAPTURE=FILE CALIBRATION=FILE)
	@mkdir -p $(TMP)
	$(GO) build -o $(TMP)/twilight ./cmd/twilight
	@compare() { $(TMP)/twilight compare --capture $(CAPTURE) --calibration $(CALIBRATION) --layers $(LAYERS) \
		--configs 'benchmark/configs/*.json' "$$@"; }; \
	set -x; compare --token-budget 256,512,1024,2048 --out $(TMP)/methods >/dev/null; \
	compare --token-budget 1024 --markdown >$(TMP)/methods/table
	@cp $(TMP)/methods/compare.svg docs/methods.svg
	@{ printf '%s\n' '# Every method, by one measure' '' \
		'All configs of `benchmark/configs` over real attention ($(notdir $(CAPTURE)), layers $(LAYERS)), calibrated on' \
		'another text. Made by `make methods`.' '' \
		'![Head error and worst mass of each method by the tokens it keeps](methods.svg)' '' \
		'A curve is a method with 256, 512, 1024 and 2048 candidates, all of them kept; points are the same candidates,' \
		'pruned. Head error is the mean relative error of the outputs of single heads, worst mass the true share of' \
		'attention that the kept tokens of the worst (layer, step, head) hold.' '' \
		'With 1024 candidates, where a method has a budget of them; coverage is the true share of attention that' \
		'candidates hold, mass that of kept tokens, error that of all outputs together. Bytes are what a KV head of a' \
		'layer reads in a step, of cache and shadow.' ''; cat $(TMP)/methods/table; } >docs/methods.md

.PHONY: test
test: ## Run every test
	$(GO) test ./...

.PHONY: race
race: ## Run the tests of the concurrent packages under the race detector (needs a C compiler)
	CGO_ENABLED=1 $(GO) test -race $(RACE_PACKAGES)

.PHONY: fuzz
fuzz: ## Fuzz every target FUZZTIME each (FUZZTIME=60s FUZZ=FuzzConfig)
	@targets=$$(grep --recursive --include='*_test.go' --exclude-dir='.?*' --only-matching --extended-regexp \
		'^func $(FUZZ)\w*' . | sort) || { echo "no fuzz target matches $(FUZZ)" >&2; exit 1; }; \
	while IFS=: read -r file func; do \
		(set -x; $(GO) test -run '^$$' -fuzz "^$${func#func }$$" -fuzztime $(FUZZTIME) "$${file%/*}") </dev/null; \
	done <<<"$$targets"

.PHONY: bench
bench: ## Run the benchmarks (BENCH=Dot BENCH_PACKAGES=./attention)
	$(GO) test -run '^$$' -bench '$(BENCH)' -benchmem $(BENCH_PACKAGES)

.PHONY: format
format: $(BIN)/buf $(BIN)/golangci-lint ## Format Go and proto files
	golangci-lint fmt
	buf format --write proto

.PHONY: lint
lint: $(BIN)/buf $(BIN)/golangci-lint ## Check style, import rules and formatting of Go and proto files
	golangci-lint config verify
	golangci-lint run
	buf lint
	buf format --diff --exit-code proto

PYTHON_PROTO := client/python/src/twilight_client/_proto/twilight
# protoc imports messages from the top of sys.path; ours lie in a package.
GENERATE = buf generate --output $(1) && \
	find $(1)/$(PYTHON_PROTO) -name '*_pb2.py*' -exec sed -i 's/^from twilight\.v1 import/from . import/' {} +

.PHONY: generate
generate: $(BIN)/buf $(BIN)/protoc $(BIN)/protoc-gen-go $(BIN)/protoc-gen-go-grpc ## Generate Go and Python code from proto/
	find proto -name '*.pb.go' -delete
	rm -rf $(PYTHON_PROTO)
	$(call GENERATE,.)

# Generates beside the tree and compares, so it tells the same with or without uncommitted work.
.PHONY: check-generate
check-generate: $(BIN)/buf $(BIN)/protoc $(BIN)/protoc-gen-go $(BIN)/protoc-gen-go-grpc ## Fail unless the generated code is current
	@rm -rf $(TMP)/generated
	@$(call GENERATE,$(TMP)/generated)
	@sums() { cd "$$1" && find proto $(PYTHON_PROTO) \( -name '*.pb.go' -or -name '*_pb2.py*' \) -exec sha256sum {} + | sort -k 2; }; \
	diff <(sums .) <(sums $(TMP)/generated) || \
		{ echo "the code that proto/ generates is not current: run 'make generate'" >&2; exit 1; }

# Compared with the commit where this branch left origin/main or, on main itself, with the commit
# before: no baseline to keep, no network. A clone of one commit can only be compared with itself,
# which still guards what is not committed.
.PHONY: breaking
breaking: $(BIN)/buf ## Fail if proto/ breaks clients of an earlier commit (BREAKING_AGAINST=v1.0.0)
	@head=$$(git rev-parse HEAD); base=$(BREAKING_AGAINST); \
	if [ -z "$$base" ]; then \
		base=$$(git merge-base HEAD origin/main 2>/dev/null || echo "$$head"); \
		[ "$$base" != "$$head" ] || base=$$(git rev-parse --verify --quiet HEAD~1 || echo "$$head"); \
	fi; \
	base=$$(git rev-parse --verify "$$base^{commit}"); \
	if git cat-file -e "$$base:proto" 2>/dev/null; then \
		(set -x; buf breaking proto --against "$$(git rev-parse --git-common-dir)#format=git,ref=$$base,subdir=proto"); \
	else \
		echo "nothing to break: commit $$base has no proto/"; \
	fi

# A stock client's view of a running daemon: reflection, and one call.
.PHONY: describe
describe: $(BIN)/grpcurl ## List and describe a daemon's service by grpcurl, and call its capabilities
	@dir=$$(mktemp -d); $(GO) build -o $$dir/ ./cmd/twilightd; \
	$$dir/twilightd --listen unix://$$dir/s 2>$$dir/log & trap "kill $$!; wait $$!; rm -r $$dir" EXIT; \
	for _ in {1..50}; do grpcurl -plaintext -unix $$dir/s grpc.health.v1.Health/Check &>/dev/null && break; sleep .1; done; \
	set -x; \
	grpcurl -plaintext -unix $$dir/s list; \
	grpcurl -plaintext -unix $$dir/s describe twilight.v1.TwilightService; \
	grpcurl -plaintext -unix $$dir/s twilight.v1.TwilightService/GetCapabilities

include gpu/cuda/cuda.mk

include client/python/python.mk
include benchmark/benchmark.mk

E2E := $(abspath $(TMP))/e2e
E2E_CONFIG := telemetry/e2e/config.json

.PHONY: e2e-commands
e2e-commands:
	@CGO_ENABLED=0 $(GO) build -o $(E2E)/ ./cmd/twilightd ./cmd/twilight

# The browser's driver, beside the scripts that need it.
.PHONY: e2e-driver
e2e-driver: e2e-commands
	@npm install --prefix $(E2E) --no-save --ignore-scripts --no-audit --no-fund --no-update-notifier --loglevel error \
		playwright-core@$(PLAYWRIGHT_VERSION)
	@cp telemetry/e2e/*.mjs $(E2E)/

E2E_ARGS := $(E2E) testdata/smollm2-demo.safetensors $(E2E_CONFIG)

.PHONY: page-e2e
page-e2e: e2e-driver ## Drive the budget page with a real browser (needs npm, and Chromium: CHROMIUM=PATH); makes docs/budgets.png
	node $(E2E)/page.mjs $(E2E_ARGS) docs/budgets.png

.PHONY: trace-e2e
trace-e2e: e2e-driver $(TMP)/phoenix/bin/phoenix ## Find per-head budgets of a real capture in Phoenix, under the engine's own trace; makes docs/trace.png
	node $(E2E)/trace.mjs $(E2E_ARGS) $(abspath $(TMP)/phoenix/bin/phoenix) docs/trace.png

.PHONY: ci
ci: ## Run all that a change must pass
	.ci/run

.PHONY: tools
tools: $(addprefix $(BIN)/,buf golangci-lint grpcurl protoc protoc-gen-go protoc-gen-go-grpc uv) ## Install the pinned tools into .tmp/bin

.PHONY: clean
clean: ## Remove the tools and all that was built
	rm -rf $(TMP) bin out

# A pin is an empty file named for a tool's version; a changed pin is newer than the tool it asks for.
$(PINS)/%:
	@mkdir -p $(BIN) $(PINS)
	@rm -f $(PINS)/$(firstword $(subst @, ,$*))@*
	@touch $@

GO_INSTALL = CGO_ENABLED=0 GOBIN=$(abspath $(BIN)) $(GO) install

# npm brings the released binary in seconds; building it takes minutes.
$(BIN)/buf: $(PINS)/buf@$(BUF_VERSION)
	@if command -v npm >/dev/null && (set -x; npm install --prefix $(TMP)/npm --no-save --ignore-scripts --no-audit \
		--no-fund --no-update-notifier --loglevel error @bufbuild/buf@$(BUF_VERSION:v%=%)); then \
		cp $(TMP)/npm/node_modules/@bufbuild/buf-*/bin/buf $@; \
	else \
		(set -x; $(GO_INSTALL) github.com/bufbuild/buf/cmd/buf@$(BUF_VERSION)); \
	fi
	@touch $@

$(BIN)/golangci-lint: $(PINS)/golangci-lint@$(GOLANGCI_LINT_VERSION)
	$(GO_INSTALL) github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT_VERSION)
	@touch $@

$(BIN)/grpcurl: $(PINS)/grpcurl@$(GRPCURL_VERSION)
	$(GO_INSTALL) github.com/fullstorydev/grpcurl/cmd/grpcurl@$(GRPCURL_VERSION)
	@touch $@

$(BIN)/protoc-gen-go: $(PINS)/protoc-gen-go@$(PROTOC_GEN_GO_VERSION)
	$(GO_INSTALL) google.golang.org/protobuf/cmd/protoc-gen-go@$(PROTOC_GEN_GO_VERSION)
	@touch $@

$(BIN)/protoc-gen-go-grpc: $(PINS)/protoc-gen-go-grpc@$(PROTOC_GEN_GO_GRPC_VERSION)
	$(GO_INSTALL) google.golang.org/grpc/cmd/protoc-gen-go-grpc@$(PROTOC_GEN_GO_GRPC_VERSION)
	@touch $@

$(BIN)/uv: $(PINS)/uv@$(UV_VERSION)
	$(PYTHON) -m venv --clear $(TMP)/uv
	$(TMP)/uv/bin/pip install --quiet uv==$(UV_VERSION)
	ln -sf ../uv/bin/uv $@
	@touch $@

# protoc for Python comes as a Python module.
$(BIN)/protoc: $(PINS)/protoc@$(GRPCIO_TOOLS_VERSION) | $(BIN)/uv
	uv venv --quiet --clear --python $(PYTHON) $(TMP)/protoc
	uv pip install --quiet --python $(TMP)/protoc/bin/python grpcio-tools==$(GRPCIO_TOOLS_VERSION)
	printf '#!/bin/sh\nexec "$${0%%/*}/../protoc/bin/python" -m grpc_tools.protoc "$$@"\n' >$@
	chmod +x $@

$(TMP)/phoenix/bin/phoenix: $(PINS)/phoenix@$(PHOENIX_VERSION) | $(BIN)/uv
	uv venv --quiet --clear --python $(PYTHON) $(TMP)/phoenix
	uv pip install --quiet --python $(TMP)/phoenix/bin/python arize-phoenix==$(PHOENIX_VERSION)
	@touch $@
