package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/cliconf"
	"github.com/twilight-sidecar/twilight/internal/replay/inprocess"
)

// connection says how to reach a daemon.
type connection struct {
	Target   string `placeholder:"URL" default:"${target}" help:"Where twilightd listens, unix:///PATH or tcp://HOST:PORT (${target})."`
	Insecure bool   `help:"Speak plain text over TCP."`
	TLSCA    string `name:"tls-ca" type:"existingfile" placeholder:"FILE" help:"PEM certificates that a TCP target's must be signed by (the system's)."`
	TLSCert  string `name:"tls-cert" type:"existingfile" placeholder:"FILE" and:"tls-key" help:"PEM certificate to show a TCP target."`
	TLSKey   string `name:"tls-key" type:"existingfile" placeholder:"FILE" and:"tls-cert" help:"PEM key of --tls-cert."`
}

func (c *connection) dial() (*client.Client, error) {
	if c.Insecure {
		return client.Dial(c.Target, client.WithInsecure())
	}
	config := &tls.Config{MinVersion: tls.VersionTLS13}
	if c.TLSCA != "" {
		pem, err := os.ReadFile(c.TLSCA)
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("--tls-ca: %s holds no PEM certificate", c.TLSCA)
		}
	}
	if c.TLSCert != "" {
		pair, err := tls.LoadX509KeyPair(c.TLSCert, c.TLSKey)
		if err != nil {
			return nil, fmt.Errorf("--tls-cert, --tls-key: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return client.Dial(c.Target, client.WithTLS(config))
}

// dialServing dials and waits until the daemon is serving.
func (c *connection) dialServing(ctx context.Context, patience time.Duration) (*client.Client, error) {
	conn, err := c.dial()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := conn.WaitServing(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// serveHere starts a daemon in this process and connects to it. stop ends both.
func serveHere(ctx context.Context) (conn *client.Client, stop func() error, err error) {
	d, err := inprocess.Start(ctx, inprocess.Options{Version: cliconf.Version()})
	if err != nil {
		return nil, nil, err
	}
	conn, err = client.Dial(d.Target())
	if err != nil {
		return nil, nil, errors.Join(err, d.Stop(ctx))
	}
	return conn, func() error { return errors.Join(conn.Close(), d.Stop(ctx)) }, nil
}
