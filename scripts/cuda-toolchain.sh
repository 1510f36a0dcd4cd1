#!/usr/bin/env bash
# Makes a folder in which the CUDA backend builds, on a machine without GPU, driver or root:
#
#     scripts/cuda-toolchain.sh [--installed] [DIR]      DIR: ~/.cache/twilight-cuda
#     . DIR/env.sh
#
# It holds nvcc and headers as Python wheels (with --installed those of $CUDA_HOME, 12.x or 13.x, are
# used instead), a cuda.h that lets gorgonia.org/cu v0.9.6 build against CUDA 13, and a libcuda.so to
# link against; at run time the loader takes the driver's. Running it again does nothing.
set -euo pipefail

# The pinned compiler: embedded kernels are reproducible with it, byte for byte.
readonly packages=(
	nvidia-cuda-nvcc==13.0.88
	nvidia-cuda-crt==13.0.88
	nvidia-nvvm==13.0.88
	nvidia-cuda-runtime==13.0.96
	nvidia-cuda-cccl==13.0.85
	nvidia-cuda-cuobjdump==13.2.86
	nvidia-cuda-nvdisasm==13.2.86
)

fail() {
	echo "cuda-toolchain: $*" >&2
	exit 1
}

installed='' dir=''
for arg in "$@"; do
	case $arg in
	--installed) installed=${CUDA_HOME:-/usr/local/cuda} ;;
	-*) fail "unknown flag $arg; usage: cuda-toolchain.sh [--installed] [DIR]" ;;
	*) dir=$arg ;;
	esac
done
dir=${dir:-$HOME/.cache/twilight-cuda}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
[[ $dir != *[[:space:]]* ]] || fail "$dir contains a space, which cgo flags cannot hold; name another folder"
command -v gcc >/dev/null || fail 'gcc not found; install a C compiler'

exec 9>"$dir/.lock"
flock 9
made=$(sha256sum "${BASH_SOURCE[0]}" | cut -d ' ' -f 1)" $installed $dir"
if [[ $(cat "$dir/.made" 2>/dev/null) == "$made" ]]; then
	exit 0
fi
rm -rf "$dir"/{.made,env.sh,cuda,shim,stub}

if [[ -n $installed ]]; then
	cuda=$installed
	[[ -x $cuda/bin/nvcc ]] || fail "no nvcc in $cuda/bin; set CUDA_HOME or leave out --installed"
else
	cuda=$dir/cuda
	[[ $(uname -m) == x86_64 ]] || fail "the pinned packages are for x86_64; install CUDA and pass --installed"
	"${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
		--no-deps --no-compile --only-binary=:all: --target "$dir/wheels" "${packages[@]}"
	mv "$dir/wheels/nvidia/cu13" "$cuda"
	rm -rf "$dir/wheels"
	chmod +x "$cuda"/bin/* "$cuda"/nvvm/bin/*
	ln -s lib "$cuda/lib64"
fi
[[ -f $cuda/include/cuda.h ]] || fail "no cuda.h in $cuda/include; install the CUDA development headers"

# CUDA 13's header maps five names to newer prototypes; libcuda still exports the old ones.
mkdir "$dir/shim"
cat >"$dir/shim/cuda.h" <<'HEADER'
/* cuda.h with the CUDA 12 meaning of the five names that gorgonia.org/cu v0.9.6 calls in that sense. */
#pragma once
#include_next <cuda.h>
#if CUDA_VERSION >= 13000
#undef cuCtxCreate
#undef cuMemAdvise
#undef cuMemPrefetchAsync
#undef cuGraphGetEdges
#undef cuGraphAddDependencies
#define cuCtxCreate cuCtxCreate_v2
#ifdef __cplusplus
extern "C" {
#endif
CUresult cuCtxCreate(CUcontext *context, unsigned int flags, CUdevice device);
CUresult cuMemAdvise(CUdeviceptr address, size_t count, CUmem_advise advice, CUdevice device);
CUresult cuMemPrefetchAsync(CUdeviceptr address, size_t count, CUdevice device, CUstream stream);
CUresult cuGraphGetEdges(CUgraph graph, CUgraphNode *from, CUgraphNode *to, size_t *edges);
CUresult cuGraphAddDependencies(CUgraph graph, const CUgraphNode *from, const CUgraphNode *to, size_t edges);
#ifdef __cplusplus
}
#endif
#endif
HEADER

# Every entry point that cuda.h declares, older versions included, each returning
# CUDA_ERROR_STUB_LIBRARY.
mkdir "$dir/stub"
for define in '' -D__CUDA_API_VERSION_INTERNAL; do
	# shellcheck disable=SC2086 # empty means no argument
	gcc -E -P -x c $define "$cuda/include/cuda.h"
done | grep -oE '\bcu[A-Z][A-Za-z0-9_]*[[:space:]]*\(' | tr -d ' (' | sort -u |
	sed 's/.*/int &(void) { return 34; }/' |
	gcc -x c -w -O1 -fno-builtin -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$dir/stub/libcuda.so" -

cat >"$dir/env.sh" <<ENV
export CUDA_HOME=$cuda
export PATH=$cuda/bin:\$PATH
export CGO_ENABLED=1
export CGO_CFLAGS="-O2 -g -I$dir/shim -I$cuda/include"
export CGO_LDFLAGS="-L$dir/stub"
ENV

# A kernel and a program that calls old and new entry points must build.
trial=$(mktemp -d)
trap 'rm -rf "$trial"' EXIT
(
	# shellcheck source=/dev/null
	. "$dir/env.sh"
	echo '__global__ void k(int *p) { *p = 1; }' >"$trial/k.cu"
	nvcc -cubin -arch=sm_80 -o "$trial/k.cubin" "$trial/k.cu"
	printf '#include <cuda.h>\nint main(void) { CUcontext c; return cuInit(0) + cuCtxCreate(&c, 0, 0); }\n' >"$trial/main.c"
	# shellcheck disable=SC2086 # flags are words
	gcc $CGO_CFLAGS -o "$trial/main" "$trial/main.c" $CGO_LDFLAGS -lcuda
) || fail 'the toolchain made does not build a trial program'

echo "$made" >"$dir/.made"
echo "cuda-toolchain: ready; source $dir/env.sh"
