package service

import (
	"context"
	"slices"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// GetCapabilities answers for every device, whatever the state of the service.
func (s *Server) GetCapabilities(
	ctx context.Context, req *twilightv1.GetCapabilitiesRequest,
) (*twilightv1.GetCapabilitiesResponse, error) {
	resp := &twilightv1.GetCapabilitiesResponse{
		Version:            s.config.Version,
		ProtocolVersionMin: protocolVersionMin,
		ProtocolVersionMax: protocolVersionMax,
	}
	query := req.GetShadow()
	var geometry *kv.Geometry
	var config *pipeline.Config
	if query != nil {
		var err error
		if geometry, config, err = s.parseModel(query.GetGeometry(), query.GetConfigJson()); err != nil {
			return nil, fault.In("shadow", err)
		}
	}
	for _, d := range s.config.Devices {
		resp.Devices = append(resp.Devices, describe(d, geometry, config))
	}
	for _, r := range s.config.Remotes {
		resp.Devices = append(resp.Devices, r.Describe(ctx, query))
	}
	return resp, nil
}

// describe tells what a device can do and, unless geometry is nil, what a shadow would take.
func describe(d gpu.Device, geometry *kv.Geometry, config *pipeline.Config) *twilightv1.Device {
	info := d.Info()
	device := deviceProto(&info)
	if geometry == nil {
		return device
	}
	perToken, err := shadowPerToken(d, &info, geometry, config)
	if err != nil {
		device.ShadowRefusal = err.Error()
	} else {
		device.ShadowBytesPerToken = &perToken
	}
	return device
}

func shadowPerToken(d gpu.Device, info *gpu.Info, g *kv.Geometry, config *pipeline.Config) (float64, error) {
	if err := checkGeometry(info, g); err != nil {
		return 0, err
	}
	return d.ShadowBytesPerToken(g, config)
}

func deviceProto(info *gpu.Info) *twilightv1.Device {
	return &twilightv1.Device{
		Id:               info.ID,
		Backend:          info.Backend,
		Name:             info.Name,
		ShadowBytesTotal: info.ShadowBytesTotal,
		ShadowBytesFree:  info.ShadowBytesFree,
		CacheDtypes:      convert[twilightv1.DataType](info.CacheDTypes),
		QueryDtypes:      convert[twilightv1.DataType](info.QueryDTypes),
		HeadSizes:        convert[uint32](info.HeadSizes),
		MaxHeadSize:      uint32(info.MaxHeadSize),
		MaxGroupSize:     uint32(info.MaxGroup),
		Selectors:        info.Selectors,
		Estimators:       info.Estimators,
		Pruners:          info.Pruners,
		Compressors:      info.Compressors,
		Kernels:          info.Kernels,
		RegionKinds:      convert[twilightv1.RegionKind](info.Regions),
		ArmedSteps:       info.ArmedSteps,
		DeviceBatches:    info.DeviceBatch,
	}
}

// convert changes the type of numbers. The domain's enums are numbered as the wire's.
func convert[To, From ~int | ~int32 | ~uint8 | ~uint32](from []From) []To {
	if len(from) == 0 {
		return nil
	}
	to := make([]To, len(from))
	for i, v := range from {
		to[i] = To(v)
	}
	return to
}

// parseModel reads what a lease is opened with, as far as no device is concerned.
func (s *Server) parseModel(g *twilightv1.Geometry, configJSON string) (*kv.Geometry, *pipeline.Config, error) {
	geometry, err := parseGeometry(g)
	if err != nil {
		return nil, nil, fault.In("geometry", err)
	}
	config, err := s.config.Methods.Parse([]byte(configJSON))
	if err != nil {
		return nil, nil, fault.In("config_json", err)
	}
	return geometry, config, nil
}

func parseGeometry(g *twilightv1.Geometry) (*kv.Geometry, error) {
	geometry := &kv.Geometry{
		Layers:     int(g.GetNumLayers()),
		QueryHeads: int(g.GetQueryHeads()),
		KVHeads:    int(g.GetKvHeads()),
		KDim:       int(g.GetKDim()),
		VDim:       int(g.GetVDim()),
		Scale:      g.GetSoftmaxScale(),
		Softcap:    g.GetLogitSoftcap(),
		Sinks:      g.GetSinks(),
		Query:      kv.DType(g.GetQueryDtype()),
		QueryScale: g.GetQueryScale(),
		Output:     kv.DType(g.GetOutputDtype()),
	}
	if geometry.Scale == 0 {
		return nil, fault.Newf(fault.Invalid, "softmax_scale", "is 0: give the model's, commonly 1/sqrt(k_dim)")
	}
	if geometry.QueryScale == 0 {
		geometry.QueryScale = 1
	}
	if geometry.QueryScale != 1 && geometry.Query != kv.F8E4M3 {
		return nil, fault.Newf(fault.Invalid, "query_scale",
			"is %v, but queries of %v are not scaled: leave it out", geometry.QueryScale, geometry.Query)
	}
	return geometry, nil
}

// checkGeometry refuses by name what the device does not declare.
func checkGeometry(info *gpu.Info, g *kv.Geometry) error {
	for _, head := range []struct {
		field string
		size  int
	}{{"k_dim", g.KDim}, {"v_dim", g.VDim}} {
		if info.HeadSizes == nil && head.size <= info.MaxHeadSize || slices.Contains(info.HeadSizes, head.size) {
			continue
		}
		if info.HeadSizes == nil {
			return fault.Newf(fault.Unsupported, "geometry."+head.field,
				"is %d: device %s takes head sizes up to %d", head.size, info.ID, info.MaxHeadSize)
		}
		return fault.Newf(fault.Unsupported, "geometry."+head.field,
			"is %d: device %s takes head sizes %v", head.size, info.ID, info.HeadSizes)
	}
	if group := g.Group(); group > info.MaxGroup {
		return fault.Newf(fault.Unsupported, "geometry.query_heads",
			"is %d, which makes groups of %d: device %s takes groups up to %d", g.QueryHeads, group, info.ID, info.MaxGroup)
	}
	for _, element := range []struct {
		field string
		dtype kv.DType
	}{{"query_dtype", g.Query}, {"output_dtype", g.Output}} {
		if !slices.Contains(info.QueryDTypes, element.dtype) {
			return fault.Newf(fault.Unsupported, "geometry."+element.field,
				"is %v: device %s takes %v", element.dtype, info.ID, info.QueryDTypes)
		}
	}
	return nil
}
