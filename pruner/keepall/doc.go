// Package keepall is the pruner that keeps every candidate, so that the selector alone decides.
package keepall
