#!/usr/bin/env python3
"""Times decode attention of one layer on one GPU: FlashInfer, torch SDPA and a Triton kernel, all dense, beside
Twilight's own dense and sparse kernels and its whole way through the service. One table, one run, one card.

    peers.py [--bin FOLDER] [--shapes 32/32x16x32768,32/8x16x32768/64] [--served ...] [--out peers.json]

A shape is QUERY_HEADS/KV_HEADSxBATCHxTOKENS[/PAGE_SIZE], in fp16 with a head size of 128. FOLDER holds
twilightd, twilight-worker, twilight and cuda.test; without it the peers are timed alone. Peers that are not
installed are left out, and said so.

Sequences have pages of their own, dealt at random. Peers read normal data, which costs them what any costs;
Twilight reads what `twilight bench --help` describes, and compares with its own dense kernel on the same. A
CUDA graph holds a call a layer, on layers that no cache holds, one behind another; a figure is the median of the
replays over their layers, in microseconds. FlashInfer's is that of its better kernel, planned outside of the
time. Twilight's kernels run back to back likewise; "chosen" is the path that its device takes by itself. "service"
is what an engine waits for a layer, a message and an answer each, tensors in lent memory, under MPS where that is
installed.
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import triton
import triton.language as tl
from mps import mps, there

DIM = 128
HALF = 2
LEAST_BYTES = 2 << 30  # that a graph reads, so that it finds nothing in a cache
MOST_LAYERS = 16
MOST_SPLITS = 64  # of a row's tokens, in Triton
SHAPES = ",".join(
    f"{heads}x{batch}x{tokens}"
    for heads in ("32/32", "32/8")
    for tokens in (8192, 32768, 131072)
    for batch in (1, 4, 16, 64)
    if not (heads == "32/32" and batch * tokens > 64 * 32768)
) + ",32/32x16x32768/1,32/32x16x32768/64,32/8x16x32768/1,32/8x16x32768/64"


class Shape:
    def __init__(self, text):
        self.text = text
        heads, batch, rest = text.split("x")
        tokens, _, page = rest.partition("/")
        self.query_heads, self.kv_heads = (int(n) for n in heads.split("/"))
        self.batch, self.tokens, self.page = int(batch), int(tokens), int(page or 16)

    @property
    def pages(self):
        """A sequence's."""
        return self.tokens // self.page

    @property
    def layer_bytes(self):
        return 2 * self.batch * self.tokens * self.kv_heads * DIM * HALF

    @property
    def group(self):
        return self.query_heads // self.kv_heads


def timed(calls, rounds):
    """The median microseconds of a call, replayed as a graph of all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:  # outside of the graph first
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in pairs:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e3 / len(calls)


class Data:
    """Paged keys and values of some layers in a pool, [pages][K|V][page][KV heads][DIM], and a query."""

    def __init__(self, shape, pool):
        self.shape = shape
        layers = max(1, min(MOST_LAYERS, pool.numel() // shape.layer_bytes, math.ceil(LEAST_BYTES / shape.layer_bytes)))
        halves = pool.view(torch.float16)
        size = shape.layer_bytes // HALF
        self.layers = [
            halves[i * size : (i + 1) * size].view(shape.batch * shape.pages, 2, shape.page, shape.kv_heads, DIM)
            for i in range(layers)
        ]
        self.table = torch.randperm(shape.batch * shape.pages, device="cuda").int().view(shape.batch, shape.pages)
        self.query = torch.randn(shape.batch, shape.query_heads, DIM, device="cuda", dtype=torch.float16)
        self.output = torch.empty_like(self.query)

    def check(self, name):
        """Compares the output of the first layer with plain attention, for the last sequence."""
        shape = self.shape
        pages = self.layers[0][self.table[-1].long()]
        keys, values = (pages[:, i].reshape(-1, shape.kv_heads, DIM) for i in (0, 1))
        worst = 0.0
        for head in range(0, shape.query_heads, max(1, shape.query_heads // 4)):
            kv_head = head // shape.group
            weights = torch.softmax(keys[:, kv_head].float() @ self.query[-1, head].float() / math.sqrt(DIM), 0)
            want = weights @ values[:, kv_head].float()
            worst = max(worst, float((self.output[-1, head].float() - want).norm() / want.norm()))
        if not worst < 5e-3:
            raise RuntimeError(f"{name} is off by {worst}")


def flashinfer_times(data, workspace, rounds):
    """By kernel: on CUDA cores, and on tensor cores."""
    import flashinfer

    shape, times = data.shape, {}
    starts = torch.arange(shape.batch + 1, dtype=torch.int32) * shape.pages
    last = torch.full((shape.batch,), shape.page, dtype=torch.int32)
    for name, tensor_cores in (("cuda cores", False), ("tensor cores", True)):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=tensor_cores, backend="fa2" if tensor_cores else "auto"
        )
        wrapper.plan(
            starts, data.table.flatten(), last, shape.query_heads, shape.kv_heads, DIM, shape.page,
            pos_encoding_mode="NONE", q_data_type=torch.float16, kv_data_type=torch.float16,
        )
        wrapper.run(data.query, data.layers[0], out=data.output)
        data.check("FlashInfer on " + name)
        times[name] = timed([lambda l=l: wrapper.run(data.query, l, out=data.output) for l in data.layers], rounds)
    return times


def sdpa_time(data, rounds):
    """Contiguous keys and values, [batch][KV heads][tokens][DIM]: there is no paged one."""
    shape = data.shape
    query = data.query.view(shape.batch, shape.query_heads, 1, DIM)

    def call(layer):
        keys, values = layer.view(2, shape.batch, shape.kv_heads, shape.tokens, DIM)
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=shape.group > 1)

    return timed([lambda l=l: call(l) for l in data.layers], rounds)


@triton.jit
def split_kernel(
    query, keys, values, table, partial, maximum, total, tokens, pages, page_stride, token_stride, scale,
    PAGE: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """A split of the tokens of one sequence and KV head, for the heads of its group."""
    b, h, split, splits = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    heads = tl.num_programs(1) * GROUP
    g, d = tl.arange(0, WIDE), tl.arange(0, D)
    row = b * heads + h * GROUP + g
    q = tl.load(query + row[:, None] * D + d[None, :], mask=g[:, None] < GROUP, other=0)
    each = tl.cdiv(tokens, splits * BLOCK) * BLOCK
    m = tl.full([WIDE], float("-inf"), tl.float32)
    s = tl.zeros([WIDE], tl.float32)
    acc = tl.zeros([WIDE, D], tl.float32)
    for first in range(split * each, tl.minimum((split + 1) * each, tokens), BLOCK):
        t = first + tl.arange(0, BLOCK)
        page = tl.load(table + b * pages + t // PAGE, mask=t < tokens, other=0).to(tl.int64)
        at = page * page_stride + (t % PAGE) * token_stride + h * D
        k = tl.load(keys + at[None, :] + d[:, None])
        v = tl.load(values + at[:, None] + d[None, :])
        x = tl.where(t[None, :] < tokens, tl.dot(q, k) * scale, float("-inf"))
        new = tl.maximum(m, tl.max(x, 1))
        p = tl.exp(x - new[:, None])
        old = tl.exp(m - new)
        s = s * old + tl.sum(p, 1)
        acc = acc * old[:, None] + tl.dot(p.to(tl.float16), v)
        m = new
    at = row * splits + split
    tl.store(partial + at[:, None] * D + d[None, :], acc, mask=g[:, None] < GROUP)
    tl.store(maximum + at, m, mask=g < GROUP)
    tl.store(total + at, s, mask=g < GROUP)


@triton.jit
def combine_kernel(partial, maximum, total, output, splits, D: tl.constexpr, MOST: tl.constexpr):
    """The splits of one query head."""
    row, i, d = tl.program_id(0), tl.arange(0, MOST), tl.arange(0, D)
    there = i < splits
    m = tl.load(maximum + row * splits + i, mask=there, other=float("-inf"))
    weight = tl.exp(m - tl.max(m, 0))
    s = tl.sum(weight * tl.load(total + row * splits + i, mask=there, other=0), 0)
    acc = tl.load(partial + (row * splits + i)[:, None] * D + d[None, :], mask=there[:, None], other=0)
    tl.store(output + row * D + d, (tl.sum(acc * weight[:, None], 0) / s).to(tl.float16))


def triton_time(data, rounds):
    shape = data.shape
    rows = shape.batch * shape.query_heads
    blocks = 4 * torch.cuda.get_device_properties(0).multi_processor_count
    splits = max(1, min(MOST_SPLITS, triton.cdiv(blocks, shape.batch * shape.kv_heads), shape.tokens // 512))
    partial = torch.empty(rows, splits, DIM, device="cuda")
    maximum, total = torch.empty(2, rows, splits, device="cuda")

    def call(layer):
        split_kernel[(shape.batch, shape.kv_heads, splits)](
            data.query, layer[:, 0], layer[:, 1], data.table, partial, maximum, total, shape.tokens, shape.pages,
            layer.stride(0), layer.stride(2), 1 / math.sqrt(DIM),
            PAGE=shape.page, GROUP=shape.group, WIDE=max(16, shape.group), D=DIM, BLOCK=64, num_warps=4, num_stages=3,
        )
        combine_kernel[(rows,)](partial, maximum, total, data.output, splits, D=DIM, MOST=MOST_SPLITS)

    call(data.layers[0])
    data.check("Triton")
    return timed([lambda l=l: call(l) for l in data.layers], rounds)


def peers(shapes, rounds):
    """By shape, then by peer; and why some are left out."""
    pool = torch.empty(max(LEAST_BYTES, *(s.layer_bytes for s in shapes)), dtype=torch.uint8, device="cuda")
    for part in pool.view(torch.float16).split(1 << 28):
        part.normal_()
    workspace = torch.zeros(512 << 20, dtype=torch.uint8, device="cuda")
    found, absent = {}, {}
    for shape in shapes:
        data, times = Data(shape, pool), {}
        for name, run in (
            ("flashinfer", lambda: flashinfer_times(data, workspace, rounds)),
            ("sdpa", lambda: sdpa_time(data, rounds)),
            ("triton", lambda: triton_time(data, rounds)),
        ):
            if name in absent:
                continue
            try:
                times[name] = run()
            except ImportError as e:
                absent[name] = str(e)
            except Exception as e:  # a peer's failure is not ours
                absent[f"{name} at {shape.text}"] = f"{type(e).__name__}: {e}"
        found[shape.text] = times
        print(shape.text, json.dumps(times), file=sys.stderr, flush=True)
    return found, absent


def chained(folder, shapes, rounds):
    """Twilight's kernels back to back, by shape."""
    with tempfile.TemporaryDirectory() as out:
        lines = pathlib.Path(out, "lines")
        subprocess.run(
            [folder / "cuda.test", "-test.run", "TestTable", "-table", ",".join(s.text for s in shapes),
             "-rounds", str(rounds), "-lines", lines],
            check=True, stdout=sys.stderr,
        )
        return {s.text: json.loads(line) for s, line in zip(shapes, lines.read_text().splitlines(), strict=True)}


def served(folder, shapes, rounds):
    """Twilight through a daemon, by shape."""
    with tempfile.TemporaryDirectory() as out, mps() as env:
        target = f"unix://{out}/s"
        # Each process takes channels of the MPS server, of which there are few.
        daemon = subprocess.Popen(
            [folder / "twilightd", "--listen", target, "--backend", "cuda", "--spares", "0", "--log-level", "error"], env=env
        )
        try:
            reports = {}
            for shape in shapes:
                run = subprocess.run(
                    [folder / "twilight", "bench", "--device", "cuda", "--target", target, "--json", "--rounds", str(rounds),
                     "--kv-heads", str(shape.kv_heads), "--group", str(shape.group), "--batch", str(shape.batch),
                     "--tokens", str(shape.tokens), "--page-size", str(shape.page)],
                    check=True, stdout=subprocess.PIPE, env=env,
                )
                reports[shape.text] = json.loads(run.stdout)
                time.sleep(1)  # until the last shape's workers have ended
            return reports
        finally:
            daemon.terminate()
            daemon.wait()


def us(x):
    return "" if x is None else f"{x:.1f}"


def table(report):
    header = ["heads", "page", "tokens", "batch", "FlashInfer", "SDPA", "Triton"]
    ours = "chained" in report
    if ours:
        header += ["dense", "of read", "sparse", "of read", "chosen", "x FlashInfer", "x dense", "service dense",
                   "service sparse", "kept", "true mass"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for text, times in report["peers"].items():
        s = Shape(text)
        flashinfer = min(times["flashinfer"].values()) if "flashinfer" in times else None
        cells = [f"{s.query_heads}/{s.kv_heads}", str(s.page), str(s.tokens), str(s.batch),
                 us(flashinfer), us(times.get("sdpa")), us(times.get("triton"))]
        if ours:
            row = report["chained"][text]
            dense, sparse = report["served"][text]["results"] if text in report["served"] else (None, None)
            cells += [us(row["dense_us"]), f"{row['dense_of_read']:.2f}", us(row["sparse_us"]), f"{row['sparse_of_read']:.2f}", row["choice"],
                      f"{flashinfer / row['chosen_us']:.2f}" if flashinfer else "", f"{row['dense_us'] / row['chosen_us']:.2f}",
                      us(dense and dense["service_us"]["median"]), us(sparse and sparse["service_us"]["median"]),
                      f"{row['kept']:.0f}", sparse and f"{sparse['true_mass']:.3f}" or ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, help="folder of twilight's commands and tests")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--served", help="those of the shapes that go through the service; all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path, help="where to write all figures as JSON")
    args = parser.parse_args()
    shapes = [Shape(text) for text in args.shapes.split(",")]
    report = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "mps": there(), "rounds": args.rounds,
    }
    start = time.time()

    def save(**found):
        report.update(found, seconds=time.time() - start)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1))

    found, absent = peers(shapes, args.rounds)
    save(peers=found, absent=absent)
    torch.cuda.empty_cache()  # the rest needs the memory
    if args.bin:
        save(chained=chained(args.bin, shapes, args.rounds))
        through = [Shape(text) for text in (args.served or args.shapes).split(",")]
        save(served=served(args.bin, through, max(3, args.rounds // 3)))
    print(f"{report['device']}, torch {report['torch']}, triton {report['triton']}, service {'under' if report['mps'] else 'without'} MPS; "
          "microseconds a layer")
    for name, why in absent.items():
        print(f"{name} is left out: {why}")
    print()
    print(table(report))


if __name__ == "__main__":
    main()
