# The CUDA backend. `make cuda-toolchain` makes what the rest needs: see scripts/cuda-toolchain.sh.

CUDA_TOOLCHAIN ?= $(HOME)/.cache/twilight-cuda
# --installed takes the CUDA of $CUDA_HOME in place of pinned packages.
CUDA_TOOLCHAIN_FLAGS ?=
# Machine code for these, and PTX for what is newer. The fused kernel needs clusters.
CUDA_ARCHS ?= 80 86 89 90a 100 120
CUDA_PTX ?= 80
CUDA_CLUSTER_ARCHS ?= 90a 100 120
CUDA_CLUSTER_PTX ?= 90
NVCC_FLAGS := -fatbin -O3 -std=c++17
# Three quarters smaller; drivers read it from 550 on.
CUDA_COMPRESS := -compress-mode=size

# The commands that link the driver, of those that are there.
CUDA_COMMANDS = $(wildcard ./cmd/twilight-worker ./cmd/twilight-engine)

CUDA_ENV = . $(CUDA_TOOLCHAIN)/env.sh &&
KERNELS := gpu/cuda/kernels
LOAD := gpu/cuda/engine/load
KERNEL_SOURCES := $(sort $(wildcard $(KERNELS)/*.cu $(KERNELS)/*.cuh $(KERNELS)/*.h) $(LOAD).cu)
GENCODE = $(foreach a,$(1),-gencode arch=compute_$(a),code=sm_$(a)) $(foreach a,$(2),-gencode arch=compute_$(a),code=compute_$(a))
COMPILE = $(CUDA_ENV) nvcc $(NVCC_FLAGS) $(CUDA_COMPRESS) $(call GENCODE,$(2),$(3)) -o $(1).fatbin $(1).cu
# What the fatbins were made of, so that a change without `make kernels` is seen where nvcc is not.
KERNEL_SUM = { cat $(KERNEL_SOURCES); \
	echo $(NVCC_FLAGS) $(CUDA_COMPRESS) $(CUDA_ARCHS) $(CUDA_PTX) $(CUDA_CLUSTER_ARCHS) $(CUDA_CLUSTER_PTX); } | sha256sum | cut -d ' ' -f 1

.PHONY: cuda-toolchain
cuda-toolchain: ## Make nvcc, headers and a libcuda to link against in CUDA_TOOLCHAIN
	scripts/cuda-toolchain.sh $(CUDA_TOOLCHAIN_FLAGS) $(CUDA_TOOLCHAIN)

.PHONY: kernels
kernels: cuda-toolchain ## Compile the CUDA kernels to the fatbins that are embedded
	$(call COMPILE,$(KERNELS)/chain,$(CUDA_ARCHS),$(CUDA_PTX))
	$(call COMPILE,$(KERNELS)/dense,$(CUDA_ARCHS),$(CUDA_PTX))
	$(call COMPILE,$(KERNELS)/armed,$(CUDA_ARCHS),$(CUDA_PTX))
	$(call COMPILE,$(KERNELS)/fused,$(CUDA_CLUSTER_ARCHS),$(CUDA_CLUSTER_PTX))
	$(call COMPILE,$(LOAD),$(CUDA_ARCHS),$(CUDA_PTX))
	@$(KERNEL_SUM) >$(KERNELS)/sources.sha256

.PHONY: check-kernels
check-kernels: ## Fail unless the embedded kernels were made of these sources and flags
	@[ "$$($(KERNEL_SUM))" = "$$(cat $(KERNELS)/sources.sha256)" ] || \
		{ echo "the kernels in $(KERNELS) are not current: run 'make kernels'" >&2; exit 1; }

# One target, of which the compiler's report tells registers and spills.
.PHONY: try-kernels
try-kernels: cuda-toolchain ## Compile the CUDA kernels for one architecture, and throw the result away
	$(CUDA_ENV) for kernel in $(KERNELS)/{chain,dense,fused,armed} $(LOAD); do \
		nvcc $(NVCC_FLAGS) -Xptxas -warn-spills $(call GENCODE,90a,) -o /dev/null $$kernel.cu; \
	done

.PHONY: build-cuda
build-cuda: build cuda-toolchain ## Build all commands into bin/: also those that need a GPU's driver, by cgo
	$(CUDA_ENV) $(GO) build -tags cuda -trimpath -o bin/ $(CUDA_COMMANDS)

.PHONY: vet-cuda
vet-cuda: cuda-toolchain ## Check the CUDA backend, and build its tests to run on a GPU machine: bin/cuda.test
	$(CUDA_ENV) $(GO) vet -tags cuda ./gpu/cuda/... ./cmd/...
	$(CUDA_ENV) $(GO) test -tags cuda -c -o bin/cuda.test ./gpu/cuda

BUNDLE := bin/gpu-bundle
# Without symbols: bundles are carried around.
BUNDLE_FLAGS := -trimpath -ldflags='-s -w'

.PHONY: gpu-bundle
gpu-bundle: cuda-toolchain ## Put all that a GPU machine needs to check and benchmark it into bin/gpu-bundle: run.sh there
	rm -rf $(BUNDLE)
	mkdir -p $(BUNDLE)/configs
	CGO_ENABLED=0 $(GO) build $(BUNDLE_FLAGS) -o $(BUNDLE)/ ./cmd/twilight ./cmd/twilightd
	$(CUDA_ENV) $(GO) build -tags cuda $(BUNDLE_FLAGS) -o $(BUNDLE)/ $(CUDA_COMMANDS)
	$(CUDA_ENV) $(GO) test -tags cuda -c $(BUNDLE_FLAGS) -o $(BUNDLE)/cuda.test ./gpu/cuda
	$(CUDA_ENV) $(GO) test -tags cuda -c $(BUNDLE_FLAGS) -o $(BUNDLE)/engine.test ./cmd/twilight-engine
	cp gpu/cuda/bundle/* benchmark/efficiency/peers.py benchmark/efficiency/mps.py testdata/smollm2-demo.safetensors $(BUNDLE)/
	mkdir $(BUNDLE)/python && cp -r client/python/src/twilight_client $(BUNDLE)/python/
	cp benchmark/configs/config_{full,quest_twi_p95}.json $(BUNDLE)/configs/
	@du -h -a --max-depth=1 $(BUNDLE) | sort -h
