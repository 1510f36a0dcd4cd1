package cli

import (
	"context"
	"fmt"
	"time"
)

type healthCmd struct {
	connection
	Wait time.Duration `default:"0s" help:"Wait this long for it to serve."`
}

func (*healthCmd) Help() string {
	return `Fit for a probe of a container:

    twilight health --target unix:///run/twilight/twilightd.sock

and for a script that starts a daemon and needs it:

    twilightd --listen unix:///tmp/tw.sock & twilight health --target unix:///tmp/tw.sock --wait 10s`
}

func (c *healthCmd) Run(ctx context.Context, term *terminal) error {
	conn, err := c.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	if c.Wait > 0 {
		ctx, cancel := context.WithTimeout(ctx, c.Wait)
		defer cancel()
		err = conn.WaitServing(ctx)
	} else {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		err = conn.Health(ctx)
	}
	if err != nil {
		return err
	}
	fmt.Fprintln(term.out, "serving")
	return nil
}
