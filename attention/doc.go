// Package attention computes softmax attention of one decode step, dense or over a list of tokens: the
// reference that devices are checked against.
//
//	logit[t] = scale * q.k[t], then softcap * tanh(logit[t] / softcap) if softcap > 0
//	out      = sum over t of exp(logit[t]) * v[t] / (sum over t of exp(logit[t]) + exp(sink))
//
// Arithmetic is float32, sums of weights float64. Each key and value is decoded once for all query
// heads that share it, and results depend on positions and values alone, not on where they lie.
package attention
