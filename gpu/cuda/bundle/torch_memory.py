#!/usr/bin/env python3
"""Lends PyTorch's GPU memory to a twilightd as its allocators have it, and attends over it there.

    torch_memory.py --bin FOLDER        of twilightd and twilight-worker; PYTHONPATH holds twilight_client

cudaMalloc'ed blocks go by CUDA IPC, with the tensors' offset inside of the block; expandable segments by the chunks
they are made of; what a stream-ordered pool holds cannot be exported, and is refused. Each allocator has a process of
its own, since PYTORCH_CUDA_ALLOC_CONF is read once.
"""

import argparse
import hashlib
import os
import subprocess
import sys

import torch
import twilight_client as tw
from cuda.bindings import driver
from twilight_client.buffer import send_fds

KV_HEADS, GROUP, DIM, PAGE, PAGES = 2, 4, 64, 16, 2048
CASES = {  # by PYTORCH_CUDA_ALLOC_CONF
    "cudaMalloc": "",
    "expandable segments": "expandable_segments:True",
    "cudaMallocAsync": "backend:cudaMallocAsync",
}


def call(function, *args):
    """Call the driver and return what it answers."""
    error, *answer = function(*args)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{function.__name__}: {error.name}")
    return answer[0] if len(answer) == 1 else answer


class TensorBuffer(tw.Buffer):
    """A tensor's memory on a GPU, lent by whatever way its allocator allows."""

    def __init__(self, session, tensor, access):
        super().__init__(session, tensor.untyped_storage().nbytes(), access)
        self.tensor = tensor  # which keeps the memory
        self._start = tensor.untyped_storage().data_ptr()

    @property
    def address(self):
        """The address of the first byte."""
        return self._start

    def _describe(self, request, lease, timeout):
        request.device = f"GPU-{torch.cuda.get_device_properties(self.tensor.device).uuid}"
        probe = self.tensor.flatten().view(torch.uint8)[:4096].cpu().numpy().tobytes()
        request.probe.length, request.probe.expected_sha256 = len(probe), hashlib.sha256(probe).digest()
        legacy = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE
        if int(call(driver.cuPointerGetAttribute, legacy, self._start)):
            base, _ = call(driver.cuMemGetAddressRange, self._start)
            request.cuda_ipc.handle = bytes(call(driver.cuIpcGetMemHandle, self._start).reserved)
            request.cuda_ipc.offset = self._start - int(base)
        else:
            self._describe_chunks(request.cuda_vmm, lease, timeout)

    def _describe_chunks(self, message, lease, timeout):
        base, _ = call(driver.cuMemGetAddressRange, self._start)
        message.offset, at = self._start - int(base), int(base)
        fds = []
        try:
            while at < self._start + self.size:
                error, chunk = driver.cuMemRetainAllocationHandle(at)
                if error != driver.CUresult.CUDA_SUCCESS:
                    raise tw.Unsupported(
                        f"the memory belongs to a stream-ordered pool, which gives no handle of it ({error.name}); "
                        "set PYTORCH_CUDA_ALLOC_CONF=backend:native, with or without expandable_segments:True"
                    )
                kind = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
                fds.append(int(call(driver.cuMemExportToShareableHandle, chunk, kind, 0)))
                call(driver.cuMemRelease, chunk)
                _, size = call(driver.cuMemGetAddressRange, at)
                message.chunks.add(size=int(size))
                at += int(size)
            for chunk, token in zip(message.chunks, send_fds(lease, fds, timeout), strict=True):
                chunk.fd_token = token
        finally:
            for fd in fds:
                os.close(fd)


def lend(session, tensor, access):
    """Lend a tensor's memory."""
    buffer = TensorBuffer(session, tensor, access)
    session._add(buffer, None)
    return buffer


def attend(cache, sequence, keys, values, query, output):
    """The relative error of the daemon's dense attention over the tensors, in place."""
    table = torch.randperm(PAGES, device="cuda")
    step = cache.step(tw.Batch([tw.Sequence(sequence, PAGES * PAGE, table.tolist())], ended=[sequence - 1] if sequence > 1 else []))
    torch.cuda.synchronize()  # the tensors are in place
    step.layer(0, query, output=output)
    k, v = (x[table].permute(1, 0, 2, 3).reshape(1, KV_HEADS, PAGES * PAGE, DIM).float() for x in (keys, values))
    want = torch.nn.functional.scaled_dot_product_attention(
        query.float().view(1, KV_HEADS * GROUP, 1, DIM), k, v, enable_gqa=True
    ).view_as(output)
    return float((output.float() - want).norm() / want.norm())


def tensors(make):
    """Keys, values, a query and an output, behind 7 MiB that keep the keys from the start of a block, and let the
    values straddle two chunks of 20 MiB."""
    shape = (PAGES, KV_HEADS, PAGE, DIM)
    before = make(7 << 19)
    return before, make(*shape), make(*shape), make(1, KV_HEADS * GROUP, DIM), make(1, KV_HEADS * GROUP, DIM)


def run(case, target):
    """Run a case in this process."""
    def make(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.float16)

    _, keys, values, query, output = tensors(make)
    geometry = tw.Geometry(1, KV_HEADS * GROUP, KV_HEADS, DIM, query=tw.DType.F16)
    with tw.dial(target) as client, client.open(geometry, {"selector": {"type": "full"}}) as session:
        if case == "cudaMallocAsync":
            try:
                lend(session, keys, tw.Access.READ_ONLY)
            except tw.Unsupported as refused:
                print(f"{case}: refused: {refused}")
                return
            raise SystemExit(f"{case}: was lent, though no other process can map it")
        lent = [lend(session, t, tw.Access.READ_ONLY) for t in (keys, values, query)]
        lent.append(lend(session, output, tw.Access.READ_WRITE))
        cache = session.register_tensors([keys], [values])
        errors = [attend(cache, 1, keys, values, query, output)]
        keys.normal_()  # in place: the daemon sees it
        values.normal_()
        errors.append(attend(cache, 2, keys, values, query, output))
        base, size = call(driver.cuMemGetAddressRange, keys.data_ptr())
        print(f"{case}: {keys.nbytes} bytes at {keys.data_ptr() - int(base)} of {int(size)}; off by {errors[0]:.1e}, and "
              f"{errors[1]:.1e} once overwritten")
        if not max(errors) < 2e-3:
            raise SystemExit(f"{case}: the outputs are wrong")
        cache.close()
        for buffer in lent:
            buffer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", help="folder of twilightd")
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--target")
    args = parser.parse_args()
    if args.case:
        run(args.case, args.target)
        return 0
    failed = 0
    with tw.Daemon("--backend", "cuda", "--log-level", "warn", program=os.path.join(args.bin, "twilightd")) as daemon:
        for case, conf in CASES.items():
            done = subprocess.run(
                [sys.executable, __file__, "--case", case, "--target", daemon.target],
                env=os.environ | ({"PYTORCH_CUDA_ALLOC_CONF": conf} if conf else {}), check=False,
            )
            failed |= done.returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
