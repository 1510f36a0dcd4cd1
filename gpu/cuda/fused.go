//go:build linux && cgo && cuda

package cuda

import (
	"slices"

	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

// fused runs rows in one launch each layer: a cluster of blocks a list row. It serves a lease whose
// geometry and method have such a kernel; rows that give up are run again by the chain.
type fused struct {
	variants []fusedVariant
	clusters map[shape]int // how many run at once

	cluster, threads int // what benchmarks set in place of what plan would choose; 0 otherwise
}

type fusedVariant struct {
	kernels.Tensor
	launch drv.Launch
}

// shape is what decides how many clusters fit the device.
type shape struct{ variant, cluster, shared int }

// fusedPlan is how the fused kernel runs a layer.
type fusedPlan struct {
	variant        int
	cluster        int // blocks of a list row
	room, capacity int // chunks that a block has room for, and candidates
	shared         int
}

// newFused prepares the fused kernels that fit a lease, none if there are none.
func newFused(l *lease) (f fused) {
	g, m := &l.geometry, &l.method
	least, most := m.limited.Budget()
	if m.selects != kernels.SelectQuest || m.estimates != kernels.EstimateInt4 || m.prunes == kernels.PruneThreshold ||
		least > 0 || most > 0 || m.config.POver != pipeline.OverCandidates || m.config.UseEstimatedWeights || g.KDim != g.VDim {
		return f
	}
	f.clusters = make(map[shape]int)
	for _, k := range l.device.kernels.Fused {
		if k.Dim == g.KDim && suits(k.Heads, l.asking()) {
			f.variants = append(f.variants, fusedVariant{k, drv.NewLaunch(k.Function, l.stream, k.Threads, l.block)})
		}
	}
	return f
}

// serves tells whether there are variants for caches of a type.
func (f *fused) serves(dtype kv.DType) bool {
	return slices.ContainsFunc(f.variants, func(v fusedVariant) bool { return v.DType == dtype })
}

// suits tells whether a kernel made for up to so many asking heads is the one to use.
func suits(heads, asking int) bool {
	return asking <= heads && (heads == kernels.HeadsATile || asking > kernels.HeadsATile)
}

// plan decides how to run the call's rows, false if the chain is to.
func (f *fused) plan(c *cache) (p fusedPlan, ok bool, err error) {
	l, a := c.lease, &c.call
	if from := l.device.options.FusedFrom; len(f.variants) == 0 || from < 0 || c.batch.longest < from || !a.sparse || !c.tensorCores() {
		return p, false, nil
	}
	rows, most := int(a.desc.Rows), 0
	for cluster := 1; cluster <= kernels.MaxCluster; cluster++ {
		for v, variant := range f.variants {
			if variant.DType != c.spec.DType || f.threads != 0 && (f.threads != variant.Threads || f.cluster != cluster) {
				continue
			}
			next := f.shape(c, v, cluster)
			if next.shared > variant.MaxShared {
				continue
			}
			fit, err := f.fit(next)
			if err != nil {
				return p, false, err
			}
			// A larger cluster is for rows too few to fill the device: it only costs where they do not all run
			// at once. Blocks that share a multiprocessor leave loads little cache if their shared memory is
			// large: then one of more threads is better.
			const large = 64 << 10
			threads := min(rows, fit) * cluster * variant.Threads
			switch {
			case fit == 0,
				ok && cluster > p.cluster && (rows > fit || threads <= most),
				ok && cluster == p.cluster && (threads < most || threads == most && p.shared+variant.Static < large):
			default:
				p, ok, most = next, true, threads
			}
		}
	}
	return p, ok, nil
}

// shape sizes a block's memory for the call.
func (f *fused) shape(c *cache, variant, cluster int) fusedPlan {
	a, v := &c.call, &f.variants[variant]
	p := fusedPlan{variant: variant, cluster: cluster, capacity: a.keepMost}
	p.room = (ceilDiv(int(a.desc.ChunkStride), cluster) + 31) / 32 * 32
	if cluster > 1 {
		// Candidates are spread evenly but for chance; a block that is short of room gives up.
		const spare = 64
		p.capacity = min(p.room, a.keepMost/cluster*5/4+spare)
	}
	p.shared = fusedShared(p.room, p.capacity, int(a.desc.Asking), v.Threads, v.Dim)
	return p
}

// fit is how many clusters run at once.
func (f *fused) fit(p fusedPlan) (int, error) {
	key := shape{p.variant, p.cluster, p.shared}
	if n, ok := f.clusters[key]; ok {
		return n, nil
	}
	launch := f.variants[p.variant].launch
	launch.Cluster(p.cluster)
	launch.Shared(p.shared)
	n, err := launch.MaxClusters()
	if err != nil {
		return 0, err
	}
	f.clusters[key] = n
	return n, nil
}

// run launches the kernel.
func (f *fused) run(p fusedPlan, rows int) error {
	launch := f.variants[p.variant].launch
	launch.Cluster(p.cluster)
	launch.Shared(p.shared)
	return launch.Run(rows*p.cluster, 1)
}

func (f *fused) free() {
	for _, v := range f.variants {
		v.launch.Free()
	}
}

// fusedShared is the dynamic shared memory of a block, as fused.cu lays it out.
func fusedShared(room, capacity, asking, threads, dim int) int {
	tokens := capacity * kv.ChunkTokens
	size := 4*room + 2*asking*tokens + (4+2+2)*capacity
	return max(size, threads/32*asking*(dim+2)*4)
}
