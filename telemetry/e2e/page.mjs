// Drives the budget page with a real browser: node page.mjs BIN CAPTURE CONFIG [PICTURE]
// BIN holds twilightd and twilight; the config audits every row. CHROMIUM names the browser; PICTURE, a PNG, is taken on the way.
import assert from "node:assert/strict";
import { once } from "node:events";
import { browse, freePort, main, start, target } from "./common.mjs";

const [bin, capture, config, picture] = process.argv.slice(2);

const port = await freePort();
const page = `http://127.0.0.1:${port}/`;
const daemon = () => start(bin, "twilightd", ["--listen", target, "--admin", `tcp://127.0.0.1:${port}`, "--drain-timeout", "100ms",
  "--log-level", "error", "--trace-url", "http://127.0.0.1:6006/redirects/traces/{trace_id}"]);
// Traced by the engine, though nothing is sent: the page names the trace.
const replay = pace => start(bin, "twilight", ["replay", "--target", target, "--capture", capture, "--config", config, "--pace", pace, "--json"],
  { OTEL_TRACES_EXPORTER: "console", OTEL_TRACES_SAMPLER: "always_on" });

await main(async () => {
  let server = daemon();
  const browser = await browse();
  try {
    const tab = await browser.newPage({ viewport: { width: 1250, height: 1000 } });
    const errors = [];
    tab.on("pageerror", e => errors.push(e.message));
    tab.on("request", r => { if (!r.url().startsWith(page)) errors.push("asked " + r.url()); });
    const status = text => tab.locator("#status", { hasText: text }).waitFor();
    const cells = tab.locator("#heat rect[data-row]");
    const steps = async () => Number(await tab.locator("#leases tbody tr td").nth(6).textContent());

    for (let tries = 0; ; tries++) {
      try { await tab.goto(page); break; } catch (e) { if (tries === 50) throw e; await new Promise(r => setTimeout(r, 100)); }
    }
    await status("live");
    assert(await tab.locator("#empty").isVisible(), "no lease, and the page does not say so");
    assert(!await tab.locator("#live").isVisible());
    console.log("ok: loads, with nothing to show");

    const engine = replay("1s");
    await cells.first().waitFor();
    assert(!await tab.locator("#empty").isVisible());
    const before = await steps();
    await tab.waitForFunction(n => Number(document.querySelector("#leases tbody tr td:nth-child(7)").textContent) > n, before);
    console.log(`ok: updates while steps run: ${await cells.count()} cells, ${await steps()} steps`);

    await tab.locator("#measures input").first().focus();
    await tab.keyboard.press("ArrowRight");
    assert(await tab.locator("input[value=candidates]").isChecked());
    assert.match(await tab.locator("#heat").getAttribute("aria-label"), /^candidates,/);
    await tab.keyboard.press("ArrowLeft");
    await tab.keyboard.press("Tab");
    assert.equal(await tab.evaluate(() => document.activeElement.id), "heat");
    await tab.keyboard.press("ArrowDown");
    await tab.keyboard.press("ArrowRight");
    const said = await tab.locator("#cell").textContent();
    assert.match(said, /^layer \d+, head 1: kept tokens [\d.,]+, candidates [\d.,]+, estimated mass [\d.]+%, true mass [\d.]+%, output error [\d.]+$/);
    console.log("ok: the keyboard walks over the map: " + said);
    await tab.waitForFunction(() => Number(document.querySelector("#leases tbody tr td:nth-child(7)").textContent) > 5);
    if (picture) await tab.screenshot({ path: picture, fullPage: true });

    await tab.keyboard.press("Tab");
    await tab.keyboard.press("Enter");
    await tab.locator("#cells tr").first().waitFor();
    assert.equal(await tab.locator("#cells tr").count(), 1 + new Set(await cells.evaluateAll(all => all.map(c => c.dataset.row))).size);
    await tab.locator("#copy").focus();
    await tab.keyboard.press("Enter");
    await tab.locator("#copied", { hasText: /copied|selected/ }).waitFor();
    const trace = await tab.locator("#trace-id").textContent();
    assert.match(trace, /^[0-9a-f]{32}$/);
    assert((await tab.locator("#trace-link").getAttribute("href")).endsWith("/traces/" + trace));
    console.log("ok: a table, and the trace to copy: " + trace);

    const stopped = once(server, "exit");
    server.kill("SIGKILL");
    await stopped;
    await status("does not answer");
    engine.kill();
    server = daemon();
    await status("live");
    await tab.locator("#empty").waitFor();
    replay("1s");
    await cells.first().waitFor();
    console.log("ok: survives a restart of the daemon");
    assert.deepEqual(errors, []);
  } finally {
    await browser.close();
  }
});
