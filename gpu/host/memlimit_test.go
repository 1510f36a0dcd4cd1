package host

import (
	"math"
	"testing"
	"testing/fstest"
)

func TestCgroupLimit(t *testing.T) {
	t.Parallel()
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }
	for name, test := range map[string]struct {
		root fstest.MapFS
		want uint64
	}{
		"no cgroups":    {fstest.MapFS{}, math.MaxUint64},
		"version 1":     {fstest.MapFS{"proc/self/cgroup": file("5:memory:/x\n"), "sys/fs/cgroup/memory.max": file("7\n")}, math.MaxUint64},
		"a container's": {fstest.MapFS{"proc/self/cgroup": file("0::/\n"), "sys/fs/cgroup/memory.max": file("4096\n")}, 4096},
		"no limit":      {fstest.MapFS{"proc/self/cgroup": file("0::/a\n"), "sys/fs/cgroup/a/memory.max": file("max\n")}, math.MaxUint64},
		"the parent's": {fstest.MapFS{
			"proc/self/cgroup":               file("1:cpu:/x\n0::/a/b\n"),
			"sys/fs/cgroup/a/b/memory.max":   file("9000\n"),
			"sys/fs/cgroup/a/memory.max":     file("8000\n"),
			"sys/fs/cgroup/other/memory.max": file("1\n"),
		}, 8000},
	} {
		if got := cgroupLimit(test.root); got != test.want {
			t.Errorf("%s: %d, want %d", name, got, test.want)
		}
	}
}
