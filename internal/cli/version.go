package cli

import (
	"fmt"
	"runtime"

	"github.com/twilight-sidecar/twilight/internal/cliconf"
)

type versionCmd struct{}

func (versionCmd) Run(term *terminal) error {
	_, err := fmt.Fprintf(term.out, "twilight %s, %s %s/%s\n", cliconf.Version(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return err
}
