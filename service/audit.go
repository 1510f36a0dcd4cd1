package service

import (
	"context"
	"time"

	"golang.org/x/time/rate"
)

// warnEvery is how often a lease may warn of audits.
const warnEvery = time.Second

// newWarnings lets a warning through now and then.
func newWarnings() *rate.Sometimes { return &rate.Sometimes{Interval: warnEvery} }

// warnAudit logs the worst audited head of l.result, if it is below the config's floor or above its
// ceiling.
func (l *lease) warnAudit(ctx context.Context, layer uint32) {
	r, floor, ceiling := &l.result, l.config.AuditMassFloor, l.config.AuditErrorCeiling
	worst, below := -1, 0
	for i, mass := range r.TrueMass {
		if !(floor > 0 && float64(mass) < floor || ceiling > 0 && float64(r.OutputError[i]) > ceiling) {
			continue
		}
		below++
		if worst < 0 || mass < r.TrueMass[worst] {
			worst = i
		}
	}
	if worst < 0 {
		return
	}
	l.warnings.Do(func() {
		head := int(r.Audited[worst])
		l.logger.WarnContext(ctx, "audit: too little attention is kept",
			"layer", layer, "sequence_index", head/l.geometry.QueryHeads, "query_head", head%l.geometry.QueryHeads,
			"true_mass", r.TrueMass[worst], "output_error", r.OutputError[worst],
			"audit_mass_floor", floor, "audit_error_ceiling", ceiling, "heads_below", below, "heads_audited", len(r.TrueMass))
	})
}
