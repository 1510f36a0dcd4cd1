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
