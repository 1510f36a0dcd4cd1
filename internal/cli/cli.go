// Package cli is the command line of twilight and of twilight-engine, which is twilight with a GPU's memory.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/alecthomas/kong"

	"github.com/twilight-sidecar/twilight/internal/cliconf"
)

const description = `Sparse decode attention as a service: the command-line client of twilightd.

Start with "twilight demo": it needs no daemon, and shows on a real model's keys and values what each
head looks at.

Every flag may also be given as an environment variable (--page-size is TWILIGHT_PAGE_SIZE) or as a key
of the YAML or JSON file that --settings names ("page-size"). A flag beats the environment, which beats
the file.`

type cli struct {
	Demo         demoCmd         `cmd:"" help:"Serve real attention in this process and show what every head keeps."`
	Replay       replayCmd       `cmd:"" help:"Replay a capture through a running twilightd and judge what comes back."`
	Compare      compareCmd      `cmd:"" help:"Run many configs over a capture: one table."`
	Budgets      budgetsCmd      `cmd:"" help:"Watch what every head of a running twilightd keeps."`
	Calibrate    calibrateCmd    `cmd:"" help:"Write the channel or head file that a method needs."`
	Bench        benchCmd        `cmd:"" help:"Time decode layers beside what this machine allows."`
	Config       configCmd       `cmd:"" help:"Check Twilight configs, or print their JSON Schema."`
	Capabilities capabilitiesCmd `cmd:"" help:"Tell what a twilightd can do, and what a shadow would take."`
	Health       healthCmd       `cmd:"" help:"Exit 0 if a twilightd is serving, 1 if not."`
	Version      versionCmd      `cmd:"" help:"Print the version."`

	Settings cliconf.File `placeholder:"FILE" help:"YAML or JSON file with values for flags."`
}

// Main runs the process's command line and returns its exit code. openGPU, if not nil, is for
// the commands that play an engine on a GPU; without it another binary runs those.
func Main(openGPU OpenGPU) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return run(ctx, os.Args[1:], os.Stdout, os.Stderr, openGPU)
}

// Exit codes.
const (
	exitOK = iota
	exitFailed
	exitUsage
)

// exit carries an exit code out of kong's help.
type exit int

func run(
	ctx context.Context, args []string, stdout, stderr io.Writer, openGPU OpenGPU,
) (code int) {
	defer func() {
		if p := recover(); p != nil {
			e, ok := p.(exit)
			if !ok {
				panic(p)
			}
			code = int(e)
		}
	}()
	var c cli
	parser, err := kong.New(&c, append(cliconf.Options(),
		kong.Name("twilight"),
		kong.Description(description),
		kong.Vars{"target": cliconf.DefaultTarget()},
		kong.Writers(stdout, stderr),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, WrapUpperBound: 100}),
		kong.Exit(func(code int) { panic(exit(code)) }),
		kong.BindTo(ctx, (*context.Context)(nil)),
		kong.Bind(&terminal{out: stdout, err: stderr}, &gpuSource{open: openGPU, args: args}),
	)...)
	if err != nil {
		fmt.Fprintf(stderr, "twilight: %v\n", err)
		return exitFailed
	}
	command, err := parser.Parse(args)
	if err != nil {
		hint := "twilight --help"
		if e := (*kong.ParseError)(nil); errors.As(err, &e) && e.Context != nil && e.Context.Command() != "" {
			hint = "twilight " + e.Context.Command() + " --help"
		}
		fmt.Fprintf(stderr, "twilight: %v\ntry %q\n", err, hint)
		return exitUsage
	}
	err = command.Run()
	switch {
	case err == nil:
		return exitOK
	case ctx.Err() != nil:
		fmt.Fprintln(stderr, "twilight: interrupted")
	default:
		fmt.Fprintf(stderr, "twilight: %v\n", err)
	}
	return exitFailed
}
