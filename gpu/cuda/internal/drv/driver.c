//go:build linux && cgo && cuda

#include "driver.h"
#include <stdlib.h>

drv_launch *drv_launch_new(CUfunction function, CUstream stream, unsigned threads, void *first)
{
	drv_launch *l = calloc(1, sizeof *l);
	if (!l)
		return NULL;
	l->function = function;
	l->config.grid_x = l->config.grid_y = l->config.grid_z = 1;
	l->config.block_x = threads;
	l->config.block_y = l->config.block_z = 1;
	l->config.stream = stream;
	l->config.attributes = &l->cluster;
	l->cluster.id = LAUNCH_ATTRIBUTE_CLUSTER;
	l->cluster.value.cluster.x = l->cluster.value.cluster.y = l->cluster.value.cluster.z = 1;
	for (int i = 0; i < DRV_MAX_ARGS; i++)
		l->params[i] = &l->args[i];
	if (first)
		l->params[0] = first;
	return l;
}

CUresult drv_launch_run(drv_launch *l) { return cuLaunchKernelEx(&l->config, l->function, l->params, NULL); }

CUresult drv_import(unsigned long long *handle, int fabric, int fd, const void *fabric_handle)
{
	if (fabric)
		return cuMemImportFromShareableHandle(handle, (void *)fabric_handle, MEM_HANDLE_FABRIC);
	return cuMemImportFromShareableHandle(handle, (void *)(intptr_t)fd, MEM_HANDLE_POSIX_FD);
}

static CUmemAllocationProp on(int device)
{
	return (CUmemAllocationProp){
		.type = MEM_ALLOCATION_PINNED,
		.handle_types = MEM_HANDLE_POSIX_FD,
		.location = {MEM_LOCATION_DEVICE, device},
	};
}

CUresult drv_create(unsigned long long *handle, int device, size_t size)
{
	CUmemAllocationProp prop = on(device);
	return cuMemCreate(handle, size, &prop, 0);
}

CUresult drv_granularity(size_t *bytes, int device)
{
	CUmemAllocationProp prop = on(device);
	return cuMemGetAllocationGranularity(bytes, &prop, 0);
}

CUresult drv_access(CUdeviceptr address, size_t size, int device, int writable)
{
	CUmemAccessDesc desc = {{MEM_LOCATION_DEVICE, device}, writable ? MEM_ACCESS_READ_WRITE : MEM_ACCESS_READ};
	return cuMemSetAccess(address, size, &desc, 1);
}
