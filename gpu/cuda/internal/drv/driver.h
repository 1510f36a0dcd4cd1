// What drv calls in libcuda, declared by hand; cuda.h of CUDA 12 and later is the original. The names
// are the versioned ones that libcuda exports.
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef int CUresult;
typedef unsigned long long CUdeviceptr;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;

typedef struct {
	int id;
	int pad;
	union {
		char pad[64];
		struct {
			unsigned x, y, z;
		} cluster;
	} value;
} CUlaunchAttribute;

typedef struct {
	unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
	CUstream stream;
	CUlaunchAttribute *attributes;
	unsigned num_attributes;
} CUlaunchConfig;

typedef struct {
	char reserved[64];
} CUipcMemHandle;

typedef struct {
	int type, id;
} CUmemLocation;

typedef struct {
	int type, handle_types;
	CUmemLocation location;
	void *win32;
	struct {
		unsigned char compression, rdma;
		unsigned short usage;
		unsigned char reserved[4];
	} flags;
} CUmemAllocationProp;

typedef struct {
	CUmemLocation location;
	int flags;
} CUmemAccessDesc;

// CUstreamBatchMemOpParams, of waits and writes of 32 bits.
typedef struct {
	int operation;
	CUdeviceptr address;
	uint64_t value;
	unsigned flags;
	CUdeviceptr alias;
	uint64_t pad;
} drv_memop;

typedef struct CUgraph_st *CUgraph;
typedef struct CUgraphExec_st *CUgraphExec;

_Static_assert(sizeof(drv_memop) == 48, "CUstreamBatchMemOpParams");
_Static_assert(sizeof(CUlaunchAttribute) == 72, "CUlaunchAttribute");
_Static_assert(sizeof(CUlaunchConfig) == 56, "CUlaunchConfig");
_Static_assert(sizeof(CUmemAllocationProp) == 32, "CUmemAllocationProp");
_Static_assert(sizeof(CUmemAccessDesc) == 12, "CUmemAccessDesc");

enum {
	LAUNCH_ATTRIBUTE_CLUSTER = 4,
	FUNC_ATTRIBUTE_SHARED = 1,
	FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED = 8,
	DEVICE_ATTRIBUTE_MAX_SHARED_OPTIN = 97,
	MEM_ALLOCATION_PINNED = 1,
	MEM_LOCATION_DEVICE = 1,
	MEM_HANDLE_POSIX_FD = 1,
	MEM_HANDLE_FABRIC = 8,
	MEM_ACCESS_READ = 1,
	MEM_ACCESS_READ_WRITE = 3,
	IPC_LAZY_PEER_ACCESS = 1,
	MEM_OP_WAIT = 1,
	MEM_OP_WRITE = 2,
	MEM_OP_WAIT_EQ = 1,
	STREAM_CAPTURE_THREAD_LOCAL = 1,
	HOST_REGISTER_PORTABLE = 1,
	HOST_REGISTER_MAPPED = 2,
	HOST_REGISTER_READ_ONLY = 8,
	NOT_READY = 600,
};

CUresult cuGetErrorName(CUresult, const char **);
CUresult cuDeviceGetUuid_v2(void *uuid, int device);
CUresult cuLaunchKernelEx(const CUlaunchConfig *, CUfunction, void **params, void **extra);
CUresult cuDeviceGetAttribute(int *, int attribute, int device);
CUresult cuFuncGetAttribute(int *, int attribute, CUfunction);
CUresult cuFuncSetAttribute(CUfunction, int attribute, int value);
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction, const CUlaunchConfig *);
CUresult cuMemHostAlloc(void **, size_t, unsigned flags);
CUresult cuMemFreeHost(void *);
CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr);
CUresult cuIpcGetMemHandle(CUipcMemHandle *, CUdeviceptr);
CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *, CUipcMemHandle, unsigned flags);
CUresult cuIpcCloseMemHandle(CUdeviceptr);
CUresult cuMemCreate(unsigned long long *, size_t, const CUmemAllocationProp *, unsigned long long flags);
CUresult cuMemExportToShareableHandle(void *, unsigned long long, int type, unsigned long long flags);
CUresult cuMemImportFromShareableHandle(unsigned long long *, void *, int type);
CUresult cuMemRelease(unsigned long long);
CUresult cuMemGetAllocationGranularity(size_t *, const CUmemAllocationProp *, int option);
CUresult cuMemAddressReserve(CUdeviceptr *, size_t, size_t alignment, CUdeviceptr, unsigned long long flags);
CUresult cuMemAddressFree(CUdeviceptr, size_t);
CUresult cuMemMap(CUdeviceptr, size_t, size_t offset, unsigned long long, unsigned long long flags);
CUresult cuMemUnmap(CUdeviceptr, size_t);
CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc *, size_t count);

CUresult cuStreamBatchMemOp_v2(CUstream, unsigned count, drv_memop *, unsigned flags);
CUresult cuStreamBeginCapture_v2(CUstream, int mode);
CUresult cuStreamEndCapture(CUstream, CUgraph *);
CUresult cuGraphInstantiateWithFlags(CUgraphExec *, CUgraph, unsigned long long flags);
CUresult cuGraphLaunch(CUgraphExec, CUstream);
CUresult cuGraphExecDestroy(CUgraphExec);
CUresult cuGraphDestroy(CUgraph);
CUresult cuStreamQuery(CUstream);
CUresult cuLaunchHostFunc(CUstream, void (*)(void *), void *);
CUresult cuFuncLoad(CUfunction);
CUresult cuMemHostRegister_v2(void *, size_t, unsigned flags);
CUresult cuMemHostUnregister(void *);
CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *, void *, unsigned flags);

// A kernel launch of which every part lies in C memory, so that Go passes one pointer and nothing is
// allocated or copied per launch. The first parameter is a struct elsewhere, or args[0].
enum { DRV_MAX_ARGS = 8 };
typedef struct {
	CUfunction function;
	CUlaunchConfig config;
	CUlaunchAttribute cluster;
	uint64_t args[DRV_MAX_ARGS];
	void *params[DRV_MAX_ARGS];
} drv_launch;

drv_launch *drv_launch_new(CUfunction, CUstream, unsigned threads, void *first);
CUresult drv_launch_run(drv_launch *);
CUresult drv_import(unsigned long long *handle, int fabric, int fd, const void *fabric_handle);
CUresult drv_create(unsigned long long *handle, int device, size_t size);
CUresult drv_granularity(size_t *, int device);
CUresult drv_access(CUdeviceptr, size_t, int device, int writable);
CUresult drv_memops(CUstream, unsigned count, drv_memop *);

// What wakes a thread of the host when a stream comes by: an eventfd, and how often it did.
typedef struct {
	int fd;
	uint32_t count;
} drv_signal;

drv_signal *drv_signal_new(int fd);
CUresult drv_signal_behind(CUstream, drv_signal *);
uint32_t drv_signal_count(const drv_signal *);
