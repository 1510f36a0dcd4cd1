// Command twilightd serves sparse decode attention to the inference engines beside it.
package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/alecthomas/kong"

	"github.com/twilight-sidecar/twilight/internal/cliconf"
)

const description = `Serves sparse decode attention to inference engines, which lend it their KV cache and stream it their queries.

On a Unix socket (the default) only this user's processes, and those of --allow-uid, are served:

    twilightd
    twilightd --listen unix:///run/twilight/twilightd.sock --log-level debug

Over TCP engines cannot lend memory, and must be told apart by client certificates, or not at all:

    twilightd --listen tcp://0.0.0.0:7443 --tls-cert d.crt --tls-key d.key --tls-client-ca ca.crt
    twilightd --listen tcp://127.0.0.1:7443 --insecure-tcp

Each flag is also read from the environment (--shadow-limit: TWILIGHT_SHADOW_LIMIT) and from the YAML or
JSON file of --settings; flags count before the environment, that before the file:

    {"listen": ["unix:///run/twilight/twilightd.sock"], "shadow-limit": "8GiB"}

SIGTERM and SIGINT drain: no new lease or step is taken, engines are told, what runs is finished, and
the process ends within 10 s. A second signal ends it at once.

Exit codes: 0 drained, 1 failed, 2 wrong usage.`

// Exit codes.
const (
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

func run(args []string, stdout, stderr io.Writer) int {
	var o options
	parser, err := kong.New(&o, append(cliconf.Options(),
		kong.Name("twilightd"),
		kong.Description(description),
		kong.Writers(stdout, stderr),
		kong.Vars{"listen": cliconf.DefaultTarget(), "version": cliconf.Version()},
	)...)
	if err == nil {
		_, err = parser.Parse(args)
	}
	if err != nil {
		fmt.Fprintf(stderr, "twilightd: %v\ntry \"twilightd --help\"\n", err)
		return exitUsage
	}
	if err := serve(context.Background(), &o, o.logger(stderr)); err != nil {
		fmt.Fprintf(stderr, "twilightd: %v\n", err)
		return exitFailed
	}
	return 0
}
