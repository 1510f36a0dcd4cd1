package host

import (
	"io/fs"
	"math"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// memoryBytes is what this process may use: the machine's memory, or less by its cgroups.
func memoryBytes() uint64 {
	limit := cgroupLimit(os.DirFS("/"))
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return min(limit, math.MaxInt64)
	}
	return min(limit, info.Totalram*uint64(info.Unit))
}

// cgroupLimit is the least memory.max of the cgroups, version 2, that this process is in, from its own up to
// the one mounted; the largest number without any.
func cgroupLimit(root fs.FS) uint64 {
	limit := uint64(math.MaxUint64)
	groups, err := fs.ReadFile(root, "proc/self/cgroup")
	if err != nil {
		return limit
	}
	for line := range strings.Lines(string(groups)) {
		group, ok := strings.CutPrefix(strings.TrimSpace(line), "0::/")
		if !ok {
			continue
		}
		for group = path.Clean(group); ; group = path.Dir(group) {
			text, err := fs.ReadFile(root, path.Join("sys/fs/cgroup", group, "memory.max"))
			if n, bad := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64); err == nil && bad == nil {
				limit = min(limit, n)
			}
			if group == "." {
				break
			}
		}
	}
	return limit
}
