// Package capture reads and writes captures: the keys, values and decode queries that a model
// left behind on a real text. It also holds the client's own yardstick, dense attention in
// float64, which shares no code with the daemon and takes nothing from it.
//
// A capture is a safetensors file. Its metadata has n (prefill tokens), steps (decode steps) and
// scale (logits = scale * q.k) besides free text on model, source and licence. For each layer l:
//
//	layer.{l}.k         [kv_heads, n+steps, k_dim]      keys, after RoPE
//	layer.{l}.v         [kv_heads, n+steps, v_dim]      values
//	layer.{l}.q         [steps, query_heads, k_dim]     queries; step s sees tokens 0..n+s
//	layer.{l}.q_window  [window, query_heads, k_dim]    optional: the prefill's last queries
//	layer.{l}.mass      [query_heads, n]                optional: attention each token received
//
// Elements are F16, BF16 or F32. Tensors under other names are ignored.
package capture
