// Package kernels holds the compiled kernels and what they are called with. Build with the tag cuda.
package kernels
