package telemetry

// scope names this package as the instrumentation scope of all that it emits.
const scope = "github.com/twilight-sidecar/twilight/telemetry"

// Spans.
const (
	// spanStep is a decode step, or an index-only one: from its Step message to the end of its last
	// layer. Its parent is the engine's span, if the message named one; it links to the span of the
	// OpenLease call. A refused Step message is a step with an error.
	spanStep = "twilight.step"
	// spanLayer is a layer of a step on the device. A refused Layer message is a layer with an error.
	spanLayer = "twilight.layer"
	// spanIndex, spanSelect, spanPrune and spanAttend are a layer's stages. Devices tell how long a stage
	// took, not when it ran, and sum it over rows that ran in parallel: the spans stand one behind
	// another, in the order that a row takes, scaled to the layer. attrStageBusy has the true sum.
	spanIndex  = "twilight.index"
	spanSelect = "twilight.select"
	spanPrune  = "twilight.prune"
	spanAttend = "twilight.attend"
	// spanRequest and the kind of a request name the span of any other message of a lease, a child of the
	// OpenLease call's: twilight.register_cache. The lease itself has no span.
	spanRequest = "twilight."
	// SpanReplay is the engine's side of a step that `twilight replay` plays: the parent of twilight.step.
	SpanReplay = "twilight.replay.step"
)

// AttrReplayStep is SpanReplay's one attribute, an int: which of the capture's steps it is.
const AttrReplayStep = "twilight.replay.index"

// Attributes of spans. Columns are in the order of proto LayerResult's, cut to maxColumn entries.
const (
	attrLease     = "twilight.lease.id"       // int: as in the log
	attrEngine    = "twilight.engine.name"    // string: the engine's name for itself
	attrDevice    = "twilight.device.id"      // string: "host", or a GPU's UUID
	attrCache     = "twilight.cache.id"       // int: the engine's choice
	attrSelector  = "twilight.selector"       // string: the config's selector type
	attrEstimator = "twilight.estimator"      // string: its weight_estimator type
	attrPruner    = "twilight.pruner"         // string: its weight_pruner type
	attrStepID    = "twilight.step.id"        // int: the engine's choice
	attrIndexOnly = "twilight.step.prefill"   // bool: the step only indexes
	attrSequences = "twilight.step.sequences" // int: rows of the batch
	attrTokens    = "twilight.step.tokens"    // int: valid tokens of all sequences
	attrLayers    = "twilight.step.layers"    // int: layers that were answered
	attrLayer     = "twilight.layer.index"    // int: the model's layer

	attrRowCandidates = "twilight.row.candidates" // int[R]: tokens that selection left
	attrRowKept       = "twilight.row.kept"       // int[R]: tokens that pruning left
	attrRowPath       = "twilight.row.path"       // string[R]: sparse, dense or void
	attrRowReason     = "twilight.row.reason"     // string[R]: why not sparse; "" if it was
	attrRows          = "twilight.rows"           // int: R, also where columns are cut
	attrHeadMass      = "twilight.head.mass"      // double[B*Hq]: estimated share of the attention that kept tokens hold
	attrHeadCoverage  = "twilight.head.coverage"  // double[B*Hq]: likewise of the candidates
	attrAuditHeads    = "twilight.audit.heads"    // int[A]: indices into B*Hq of the audited heads
	attrAuditMass     = "twilight.audit.mass"     // double[A]: their true mass
	attrAuditError    = "twilight.audit.error"    // double[A]: their output's relative error

	attrKeptTokens  = "twilight.tokens.kept"     // int: sum over rows, of a step over its layers too
	attrValidTokens = "twilight.tokens.valid"    // int: what dense attention would have kept
	attrReadCache   = "twilight.read.cache"      // int, bytes: read of the lent cache
	attrReadShadow  = "twilight.read.shadow"     // int, bytes: read of the shadow
	attrReadDense   = "twilight.read.dense"      // int, bytes: what dense attention would have read
	attrIndexed     = "twilight.index.tokens"    // int: tokens read and written to the shadow
	attrClaimed     = "twilight.index.claimed"   // int: tokens that claims kept from that
	attrDrifted     = "twilight.index.drifted"   // int: chunks that stray from what equalisation was frozen on
	attrRefreshes   = "twilight.index.refreshes" // int: times that equalisation was refreshed
	attrStageBusy   = "twilight.stage.busy"      // int, nanoseconds: the stage, summed over rows in parallel
	attrErrorField  = "twilight.error.field"     // string: path of the field at fault
)

// Attributes of metrics only. attrError holds a code of proto ErrorCode in lower case.
const (
	attrError   = "error.type" // semantic conventions
	attrPath    = "twilight.path"
	attrReason  = "twilight.reason"      // of workers: ended, failed, device_lost, crashed, killed, unresponsive, start_timeout, overdue
	attrStage   = "twilight.stage"       // index, select, prune, attend
	attrRequest = "twilight.request"     // step, layer, register_cache, ...
	attrSource  = "twilight.source"      // cache, shadow
	attrPhase   = "twilight.phase"       // prefill: by an index-only step; decode: by a layer
	attrOutcome = "twilight.outcome"     // indexed, claimed
	attrOver    = "otel.metric.overflow" // semantic conventions: layers beyond maxSeries, together
	attrPart    = "otel.component.type"  // semantic conventions

	attrWorkerState = "twilight.worker.state" // starting, spare, leased, ending
	attrWorkerStart = "twilight.worker.start" // cold, warm
)

// metric names a metric and says what it is.
type metric struct{ name, unit, text string }

// Metrics. Those by layer have the attributes attrLayer, attrSelector, attrEstimator and attrPruner, in
// at most maxSeries combinations, and one more for all others (attrOver). All other attributes have the
// few values that their comments name. Nothing is named by lease, sequence or engine. Sampled steps leave
// exemplars in histograms. What workers count is in the sums; of one that is killed the last second may be
// missing.
var (
	// By layer. metricStage also by attrStage, metricRows by attrPath and attrReason, metricRead by
	// attrSource.
	metricKept       = metric{"twilight.row.kept", "{token}", "Tokens that a row kept"}
	metricCandidates = metric{"twilight.row.candidates", "{token}", "Tokens that selection left to a row"}
	metricValid      = metric{"twilight.row.valid", "{token}", "Tokens that a row had: what dense attention keeps"}
	metricMass       = metric{"twilight.head.mass", "1", "Estimated share of the attention that a query head's kept tokens hold"}
	metricCoverage   = metric{"twilight.head.coverage", "1", "Estimated share of the attention that a query head's candidates hold"}
	metricTrueMass   = metric{"twilight.audit.mass", "1", "True share of the attention that an audited query head's kept tokens hold"}
	metricError      = metric{"twilight.audit.error", "1", "Relative error of an audited query head's output against dense attention"}
	metricLayer      = metric{"twilight.layer.duration", "s", "Time of a layer on the device"}
	metricStage      = metric{"twilight.stage.duration", "s", "Time of a stage of a layer, summed over rows that ran in parallel"}
	metricRows       = metric{"twilight.rows", "{row}", "Rows computed, by path and the reason if not sparsely"}
	metricRead       = metric{"twilight.read", "By", "Bytes that layers read of the cache and of the shadow"}
	metricReadDense  = metric{"twilight.read.dense", "By", "Bytes that dense attention would have read for the same layers"}

	// Of messages: by attrPhase, attrRequest, nothing, nothing, and attrRequest with attrError.
	metricStep    = metric{"twilight.step.duration", "s", "Time from a step's message to the end of its last layer, the engine's own time included"}
	metricRequest = metric{"twilight.request.duration", "s", "Time from a message of a lease to its answer"}
	metricQueue   = metric{"twilight.request.wait", "s", "Time that a message of a lease waited for those before it"}
	metricActive  = metric{"twilight.request.active", "{request}", "Messages of leases received and not yet answered"}
	metricErrors  = metric{"twilight.request.errors", "{request}", "Messages of leases that were refused, by the error's code"}

	// Of indexing: by attrPhase and attrOutcome, nothing, nothing.
	metricIndexed   = metric{"twilight.index.tokens", "{token}", "Tokens, once per layer, that were indexed or kept from it by claims"}
	metricDrifted   = metric{"twilight.index.drifted", "{chunk}", "Chunks indexed whose keys stray from what equalisation was frozen on"}
	metricRefreshes = metric{"twilight.index.refreshes", "{refresh}", "Times that a layer's equalisation was refreshed and its shadow rebuilt"}

	metricLeases   = metric{"twilight.leases", "{lease}", "Leases open"}
	metricOpened   = metric{"twilight.leases.opened", "{lease}", "Leases opened since the start"}
	metricRegions  = metric{"twilight.regions", "{region}", "Regions of memory lent"}
	metricCaches   = metric{"twilight.caches", "{cache}", "Caches registered"}
	metricLent     = metric{"twilight.memory.lent", "By", "Memory lent by engines"}
	metricShadow   = metric{"twilight.memory.shadow", "By", "Memory that shadows take"}
	metricDraining = metric{"twilight.draining", "", "1 once the daemon takes no more leases and steps"}

	// Of the processes that serve leases on GPUs, where there are any: by attrWorkerState, nothing,
	// attrWorkerStart and attrReason; by attrDevice.
	metricWorkers     = metric{"twilight.workers", "{worker}", "Workers"}
	metricWorkerStart = metric{"twilight.worker.start.duration", "s", "Time from a worker's start until it could serve"}
	metricWorkerOpen  = metric{"twilight.worker.open.duration", "s", "Time until a lease was opened on a worker, a warm spare or one started for it"}
	metricWorkerEnds  = metric{"twilight.worker.ends", "{worker}", "Workers that ended, by reason"}
	metricGPUUsable   = metric{"twilight.gpu.usable", "", "1 while leases can be opened on the GPU"}
	metricGPUMPS      = metric{"twilight.gpu.mps", "", "1 if the GPU's workers run under an MPS server"}

	// Semantic conventions, of unary calls: by rpc.system.name, rpc.method and rpc.response.status_code.
	// Their spans have the same attributes and are named by the method.
	metricCall = metric{"rpc.server.call.duration", "s", "Time of a unary call"}

	// Semantic conventions, by attrPart; with attrError, what was lost. The SDK's own are experimental
	// and do not count all of it.
	metricSpans    = metric{"otel.sdk.processor.span.processed", "{span}", "Sampled spans that ended; with an error those dropped since the exporter was behind"}
	metricExported = metric{"otel.sdk.exporter.span.exported", "{span}", "Spans handed to the exporter; with an error those lost since the collector refused or did not answer"}
	metricPushed   = metric{"otel.sdk.exporter.metric_data_point.exported", "{data_point}", "Data points handed to the exporter; with an error those lost"}
)

// Log fields of records about a request whose step is traced.
const (
	logTrace = "trace_id" // 32 hex digits
	logSpan  = "span_id"  // 16 hex digits
)

const (
	// maxColumn bounds the entries of an array attribute.
	maxColumn = 1024
	// maxSeries bounds the combinations of layer and method in metrics.
	maxSeries = 512
)
