// Command twilight talks to a twilightd: it asks what it can do, replays real attention through it,
// compares configs, and shows all of that in a demo which needs no daemon.
package main

import (
	"os"

	"github.com/twilight-sidecar/twilight/internal/cli"
)

func main() { os.Exit(cli.Main(nil)) }
