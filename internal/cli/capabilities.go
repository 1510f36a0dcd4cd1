package cli

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/twilight-sidecar/twilight/client"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

type capabilitiesCmd struct {
	connection
	Config     string `type:"existingfile" placeholder:"FILE" help:"Twilight config whose shadow is asked for, with the geometry."`
	Layers     int    `placeholder:"N" and:"geometry" help:"Layers of the cache."`
	QueryHeads int    `placeholder:"N" help:"Query heads (as many as KV heads)."`
	KVHeads    int    `name:"kv-heads" placeholder:"N" and:"geometry" help:"KV heads."`
	HeadSize   int    `placeholder:"N" and:"geometry" help:"Elements of a key head."`
	VHeadSize  int    `name:"v-head-size" placeholder:"N" help:"Elements of a value head (as of a key head)."`
	JSON       bool   `name:"json" help:"Print the daemon's answer as JSON."`
}

func (*capabilitiesCmd) Help() string {
	return `What would a shadow for Llama 3.1 8B take?

    twilight capabilities --config config_quest_twi.json \
        --layers 32 --query-heads 32 --kv-heads 8 --head-size 128`
}

func (c *capabilitiesCmd) Run(ctx context.Context, term *terminal) error {
	conn, err := c.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	var query *client.ShadowQuery
	if c.Layers > 0 {
		query = &client.ShadowQuery{Geometry: client.Geometry{
			Layers: c.Layers, QueryHeads: cmp.Or(c.QueryHeads, c.KVHeads), KVHeads: c.KVHeads,
			KDim: c.HeadSize, VDim: c.VHeadSize, Query: client.F16,
		}}
		if c.Config != "" {
			config, err := os.ReadFile(c.Config)
			if err != nil {
				return err
			}
			query.Config = string(config)
		}
	} else if c.Config != "" {
		return fmt.Errorf("--config asks for a shadow: give --layers, --kv-heads and --head-size, too")
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	answer, err := conn.Capabilities(ctx, query)
	if err != nil {
		return err
	}
	if c.JSON {
		text, err := protojson.MarshalOptions{Multiline: true, EmitUnpopulated: true}.Marshal(answer)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(term.out, "%s\n", text)
		return err
	}
	printCapabilities(term.out, answer)
	return nil
}

func printCapabilities(w io.Writer, answer *client.Capabilities) {
	fmt.Fprintf(w, "twilightd %s, protocol %d to %d\n",
		answer.GetVersion(), answer.GetProtocolVersionMin(), answer.GetProtocolVersionMax())
	for _, d := range answer.GetDevices() {
		fmt.Fprintf(w, "\ndevice %s (%s): %s\n", d.GetId(), d.GetBackend(), d.GetName())
		row := func(name, value string) {
			if value != "" {
				fmt.Fprintf(w, "  %-16s %s\n", name, value)
			}
		}
		row("unusable", d.GetUnusable())
		if d.Mps != nil {
			row("MPS", yesNo(d.GetMps()))
		}
		row("shadow memory", fmt.Sprintf("%s free of %s", bytesText(d.GetShadowBytesFree()), bytesText(d.GetShadowBytesTotal())))
		row("caches", names(d.GetCacheDtypes(), "DATA_TYPE_"))
		row("queries", names(d.GetQueryDtypes(), "DATA_TYPE_"))
		sizes := fmt.Sprintf("1 to %d", d.GetMaxHeadSize())
		if len(d.GetHeadSizes()) > 0 {
			sizes = strings.Trim(fmt.Sprint(d.GetHeadSizes()), "[]")
		}
		row("head sizes", sizes)
		row("group size", fmt.Sprintf("up to %d query heads a KV head", d.GetMaxGroupSize()))
		row("selectors", strings.Join(d.GetSelectors(), " "))
		row("estimators", strings.Join(d.GetEstimators(), " "))
		row("pruners", strings.Join(d.GetPruners(), " "))
		row("compressors", strings.Join(d.GetCompressors(), " "))
		row("memory", names(d.GetRegionKinds(), "REGION_KIND_"))
		row("kernels", strings.Join(d.GetKernels(), " "))
		row("armed steps", yesNo(d.GetArmedSteps()))
		row("device batches", yesNo(d.GetDeviceBatches()))
		if d.ShadowBytesPerToken != nil {
			row("shadow", fmt.Sprintf("%.1f bytes a token for this geometry and config", d.GetShadowBytesPerToken()))
		}
		if d.GetShadowRefusal() != "" {
			row("shadow", "refused: "+d.GetShadowRefusal())
		}
	}
}

// names lists enum values as people write them.
func names[E interface {
	twilightv1.DataType | twilightv1.RegionKind
	fmt.Stringer
}](values []E, prefix string) string {
	var list []string
	for _, v := range values {
		list = append(list, strings.ToLower(strings.TrimPrefix(v.String(), prefix)))
	}
	return strings.Join(list, " ")
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// bytesText is a size with a binary unit.
func bytesText(n uint64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	size, unit := float64(n), 0
	for size >= 1024 && unit < len(units)-1 {
		size, unit = size/1024, unit+1
	}
	if unit == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", size, units[unit])
}
