// Package lowbit keeps vectors in few bits, each quantised by itself: what estimators that guess logits
// and label caches that rank tokens have in common. With b bits a code:
//
//	asymmetric   scale = (max - min) / (2^b - 1)     zero = min
//	             code  = clamp(round((x - zero) / scale), 0, 2^b - 1)
//	symmetric    scale = max |x| / (2^(b-1) - 1)     zero = -max |x|
//	             code  = clamp(round((x - zero) / scale), 0, 2^b - 2)    so that 0 stays 0
//	both         q.x  ~= scale * q.code + zero * sum(q)
//
// Scale and zero are stored as fp16 and used as stored; a symmetric zero is made of the stored scale. A
// vector has a NaN estimate if one of its values is not finite or these numbers lie beyond fp16.
package lowbit
