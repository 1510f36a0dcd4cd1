// Decodes a capture with a traced engine, and finds in Phoenix what every head kept, on the layer spans under the
// engine's own: node trace.mjs BIN CAPTURE CONFIG PHOENIX [PICTURE]
// PHOENIX is its binary; PICTURE, a PNG, shows a layer's span there.
import assert from "node:assert/strict";
import { once } from "node:events";
import { browse, folder, freePort, main, start, target, until } from "./common.mjs";

const [bin, capture, config, phoenix, picture] = process.argv.slice(2);
const [port, otlpPort] = [await freePort(), await freePort()];
const backend = `http://127.0.0.1:${port}`;
const otlp = {
  OTEL_TRACES_EXPORTER: "otlp", OTEL_EXPORTER_OTLP_ENDPOINT: `http://127.0.0.1:${otlpPort}`, OTEL_EXPORTER_OTLP_PROTOCOL: "grpc",
  OTEL_METRICS_EXPORTER: "none",
};

async function get(path) {
  const answer = await fetch(backend + path);
  assert(answer.ok, `${path}: ${answer.status}`);
  return answer.json();
}

async function spans() {
  const all = [];
  for (let cursor = ""; cursor !== null;) {
    const page = await get(`/v1/projects/default/spans?limit=1000${cursor && "&cursor=" + cursor}`);
    all.push(...page.data);
    cursor = page.next_cursor ?? null;
  }
  return all;
}

await main(async () => {
  start("", phoenix, ["serve"], {
    PHOENIX_WORKING_DIR: folder, PHOENIX_HOST: "127.0.0.1", PHOENIX_PORT: port, PHOENIX_GRPC_PORT: otlpPort,
    PHOENIX_TELEMETRY_ENABLED: "false", PHOENIX_ALLOW_EXTERNAL_RESOURCES: "false",
  }, ["ignore", "ignore", "ignore"]);
  await until("Phoenix", async () => (await fetch(backend + "/healthz")).ok);
  start(bin, "twilightd", ["--listen", target, "--log-level", "error"], otlp);

  const replay = start(bin, "twilight", ["replay", "--target", target, "--capture", capture, "--config", config, "--json"],
    { ...otlp, OTEL_TRACES_SAMPLER: "always_on" }, ["ignore", "pipe", "inherit"]);
  let said = "";
  replay.stdout.on("data", data => { said += data; });
  const [code] = await once(replay, "close");
  assert.equal(code, 0);
  const report = JSON.parse(said);

  const layers = await until(`spans of ${report.steps} steps`, async () => {
    const all = await spans();
    const found = all.filter(s => s.name === "twilight.layer");
    if (found.length !== report.steps * report.layers.length) return;
    const byID = new Map(all.map(s => [s.context.span_id, s]));
    for (const s of found) {
      const step = byID.get(s.parent_id), engine = byID.get(step?.parent_id);
      if (!engine) return;
      assert.equal(step.name, "twilight.step");
      assert.equal(engine.name, "twilight.replay.step");
      for (const name of ["twilight.select", "twilight.prune", "twilight.attend"]) {
        if (!all.some(child => child.parent_id === s.context.span_id && child.name === name)) return;
      }
    }
    return found;
  });
  let budgets = 0;
  for (const { layer, heads } of report.layers) {
    const rows = layers.filter(s => s.attributes["twilight.layer.index"] === layer).map(s => s.attributes["twilight.row.kept"]);
    assert.equal(rows.length, report.steps);
    for (const { head, kept } of heads) {
      const mean = rows.reduce((sum, row) => sum + row[head], 0) / rows.length;
      assert(Math.abs(mean - kept) < 1e-6, `layer ${layer}, head ${head}: spans say ${mean} tokens kept, the engine saw ${kept}`);
      budgets++;
    }
  }
  console.log(`ok: ${report.steps} steps, ${report.layers.length} layers, ${budgets} budgets by head found in Phoenix under the engine's spans`);

  if (!picture) return;
  const browser = await browse();
  try {
    const tab = await browser.newPage({ viewport: { width: 1400, height: 1000 } });
    const span = layers.at(-1);
    await tab.goto(`${backend}/redirects/spans/${span.context.span_id}`);
    await tab.getByRole("tab", { name: "Attributes" }).click();
    await tab.getByText("twilight.row.kept.0").first().evaluate(e => e.scrollIntoView({ block: "center" }));
    await tab.screenshot({ path: picture });
  } finally {
    await browser.close();
  }
});
