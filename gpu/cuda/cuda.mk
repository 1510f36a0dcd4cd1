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

CUDA_ENV = . $(CUDA_TOOLCHAIN)/env.sh &&
KERNELS := gpu/cuda/kernels
KERNEL_SOURCES := $(sort $(wildcard $(KERNELS)/*.cu $(KERNELS)/*.cuh $(KERNELS)/*.h))
GENCODE = $(foreach a,$(1),-gencode arch=compute_$(a),code=sm_$(a)) $(foreach a,$(2),-gencode arch=compute_$(a),code=compute_$(a))
COMPILE = $(CUDA_ENV) nvcc $(NVCC_FLAGS) $(CUDA_COMPRESS) $(call GENCODE,$(2),$(3)) -o $(KERNELS)/$(1).fatbin $(KERNELS)/$(1).cu
# What the fatbins were made of, so that a change without `make kernels` is seen where nvcc is not.
KERNEL_SUM = { cat $(KERNEL_SOURCES); \
	echo $(NVCC_FLAGS) $(CUDA_COMPRESS) $(CUDA_ARCHS) $(CUDA_PTX) $(CUDA_CLUSTER_ARCHS) $(CUDA_CLUSTER_PTX); } | sha256sum | cut -d ' ' -f 1

.PHONY: cuda-toolchain
cuda-toolchain: ## Make nvcc, headers and a libcuda to link against in CUDA_TOOLCHAIN
	scripts/cuda-toolchain.sh $(CUDA_TOOLCHAIN_FLAGS) $(CUDA_TOOLCHAIN)

.PHONY: kernels
kernels: cuda-toolchain ## Compile the CUDA kernels to the fatbins that are embedded
	$(call COMPILE,chain,$(CUDA_ARCHS),$(CUDA_PTX))
	$(call COMPILE,dense,$(CUDA_ARCHS),$(CUDA_PTX))
	$(call COMPILE,armed,$(CUDA_ARCHS),$(CUDA_PTX))
	$(call COMPILE,fused,$(CUDA_CLUSTER_ARCHS),$(CUDA_CLUSTER_PTX))
	$(call COMPILE,bench,$(CUDA_ARCHS),$(CUDA_PTX))
	@$(KERNEL_SUM) >$(KERNELS)/sources.sha256

.PHONY: check-kernels
check-kernels: ## Fail unless the embedded kernels were made of these sources and flags
	@[ "$$($(KERNEL_SUM))" = "$$(cat $(KERNELS)/sources.sha256)" ] || \
		{ echo "the kernels in $(KERNELS) are not current: run 'make kernels'" >&2; exit 1; }

# One target, of which the compiler's report tells registers and spills.
.PHONY: try-kernels
try-kernels: cuda-toolchain ## Compile the CUDA kernels for one architecture, and throw the result away
	$(CUDA_ENV) for kernel in chain dense fused armed bench; do \
		nvcc $(NVCC_FLAGS) -Xptxas -warn-spills $(call GENCODE,90a,) -o /dev/null $(KERNELS)/$$kernel.cu; \
	done

.PHONY: build-cuda
build-cuda: cuda-toolchain ## Build the commands that need a GPU's driver into bin/
	$(CUDA_ENV) $(GO) build -tags cuda -trimpath -o bin/ ./cmd/...

.PHONY: vet-cuda
vet-cuda: cuda-toolchain ## Check the CUDA backend, and build its tests to run on a GPU machine: bin/cuda.test
	$(CUDA_ENV) $(GO) vet -tags cuda ./gpu/cuda/...
	$(CUDA_ENV) $(GO) test -tags cuda -c -o bin/cuda.test ./gpu/cuda
